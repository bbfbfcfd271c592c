"""
Byte-pair encoding with a heap: the same merges as tokenizer.train_bpe_plain, in less time
(docs/speed.md).
"""

import heapq
from collections import Counter, defaultdict
from itertools import pairwise


def train_bpe(counts, merges, merge):
    """{bytes: rank} of {word: count}, as tokenizer.train_bpe_plain returns it.

    A merge changes only the words that contain its pair, so each pair keeps the set of its words. A
    heap holds the pairs by count; an entry whose count has changed since is skipped when it comes
    up. merge: tokenizer.merge."""
    vocabulary = [bytes([i]) for i in range(256)]
    words = [list(word.encode("utf-8")) for word in counts]
    weights = list(counts.values())
    pairs, words_with = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += weights[i]
            words_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while len(vocabulary) < 256 + merges and heap:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:
            continue  # an old entry: the count has changed since
        if -count < 2:
            break
        new = len(vocabulary)
        vocabulary.append(vocabulary[pair[0]] + vocabulary[pair[1]])
        changes = Counter()
        for i in words_with.pop(pair):
            merged = merge(words[i], pair, new)
            for old_pair in pairwise(words[i]):
                changes[old_pair] -= weights[i]
            for new_pair in pairwise(merged):
                changes[new_pair] += weights[i]
                words_with[new_pair].add(i)
            words[i] = merged
        for other, change in changes.items():
            if change:
                pairs[other] += change
                heapq.heappush(heap, (-pairs[other], other))
        pairs.pop(pair)
    return {token: rank for rank, token in enumerate(vocabulary)}
