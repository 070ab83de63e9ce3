"""RULER (Hsieh et al. 2024): its thirteen tasks, made from their published definitions and literal prompts.

As published (NVIDIA/RULER, Apache-2.0): prompts and answer openings to the letter, what is hidden, how often words
occur, the tokens of an answer, which count inside the length, and the scores. Ours, so that lengths are met and depths
covered:

- a prompt is filled to the last small unit (a word, a clause) where the published generator steps by up to 500 words;
- the first evidence lies at depths that cover the text evenly over the samples, where the published one draws them, or
  shuffles documents with one seed for all samples;
- each sample has its own randomness; a published run has one stream for all.
"""
