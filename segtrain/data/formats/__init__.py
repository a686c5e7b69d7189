"""Labels as annotation tools export them: one file a format, and one rasteriser for all of them."""
