"""The whole recipe on the toy world: all of train.py's other defaults are made for it."""

data = "data/toy"
out = "out/toy"
select_layer = -2  # DINO teaches its last block to fill the CLS vector, at the places' expense
