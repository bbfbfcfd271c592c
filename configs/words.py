"""
The paper's language model; give it after the config of a phase, on data prepared with --vocab:

    python data.py saycam --name saycam_words --vocab vocab.json --frames ... --annotations ...
    torchrun train.py configs/phase0.py configs/words.py

2,350 words, context 1,024. GPT-2: 2350 * 256 + 1024 * 256 + 8 * 789760 + 512 = 7,182,336
parameters; ours, with three specials beside the words: 2353 * 256 + 6426880 = 7,029,248.
"""

data = "data/saycam_words"
out = "out/saycam_words"
block_size = 1024
