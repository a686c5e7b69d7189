"""The README's plugins, and paths with characters that are special to a shell or to Hydra."""

from tests.helpers.checkout import ROOT

FOLDER = ROOT / "tests" / "fixtures" / "plugins"
PLUGINS = [FOLDER / "my_backbone.py", FOLDER / "my_dataset.py", FOLDER / "my_loss.py"]
OWN_PARTS = [
    "model=plain", "model.backbone_options={width: 8}", "dataset=ponds", "loss=easy_less", "loss.options={gamma: 3}",
]  # fmt: skip
ODD = [
    "photo (1).jpg", "epoch=3.pt", "it's.jpg", "a,b.jpg", "2024_01", "with space", "#1", "[x", "a[0].png", "ä ö ü.png",
    "日本.png", 'say "hi".jpg', "back\\slash", "end\\", "$HOME", "1e3", "null_", "true", "{a:b}", "a:b", "~x",
]  # fmt: skip
