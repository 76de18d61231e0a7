"""The vocabulary's order is a file format: token ids of trained checkpoints point into it."""

from foveate.scenes.vocabulary import COLORS, DIGITS, NAMES, WORDS


def test_sizes_and_distinctness():
    assert (len(NAMES), len(COLORS), len(DIGITS), len(WORDS)) == (48, 8, 10, 91)
    assert len(set(WORDS)) == 91


def test_ids_of_landmarks():
    landmarks = {
        0: "<pad>",
        1: "<bos>",
        2: "<eos>",
        3: "<image>",
        4: "USER",
        5: "ASSISTANT",
        6: "?",
        15: "no",
        24: "yes",
    }
    landmarks |= {25: "dog", 52: "cake", 72: "umbrella", 73: "red", 80: "black", 81: "0", 90: "9"}
    assert {index: WORDS[index] for index in landmarks} == landmarks
