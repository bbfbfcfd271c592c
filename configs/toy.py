"""The whole recipe on the toy world, for which the defaults of train.py are made."""

data = "data/toy"
out = "out/toy"
