"""`segtrain report`: one HTML file about a run, which needs no network."""
