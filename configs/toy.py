"""The whole recipe on the toy world: all of train.py's defaults are made for it."""

data = "data/toy"
out = "out/toy"
