"""GPT-2 from scratch in MLX: a tutorial in one file.

    python train.py                     train on input.txt, then generate text
    python train.py --sample "To be"    continue a prompt with the trained model
    python train.py --look "To be"      show what it attends to and what it predicts next
    python train.py --resume            resume an interrupted run

GPT-2 is a *transformer*, a kind of *neural network*: a function with many adjustable numbers. It
reads text and predicts what comes next, here one character at a time. We build it, train it, and
generate text with it. MLX is Apple's library for this: it computes with arrays, as NumPy does, and
can use the GPU, the graphics processor of a Mac.

     1. Settings      5. Loss and learning      9. Training               13. The run
     2. Data          6. Attention             10. Sampling               14. The command line
     3. Tokenizer     7. MLP and block         11. Checks and files
     4. Batches       8. GPT                   12. Prompts and pictures

Sections 1 to 10 are the lesson. Read them from the top: each builds on what comes before it. (Where
something comes early, such as the cache, a comment names the section that explains it.) Then change
something, run it again, and compare the validation loss: how badly the model predicts text that was
held out from training. Lower is better. A model that guesses uniformly gets 4.17. On the shipped
input.txt, the small model, for machines without a GPU, gets 1.54, and the default model 1.25.

First things to try: `n_heads = 1`, your own text in input.txt, and, without training again, another
`temperature` with --sample. The README has more experiments.
"""

# For uv, a tool that installs what a script needs:
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26.4", "mlx>=0.32.4", "mlx[cpu]>=0.32.4; sys_platform == 'linux'",
#                 "mlx-cpu>=0.32.4; sys_platform == 'win32'"]
# ///

import argparse
import io
import json
import math
import os
import shutil
import sys
import textwrap
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

# %% 1. Settings
#
# These are the *hyperparameters*, the numbers we choose. On a first reading, skip them: each is
# explained where it is used. (*Parameters*, also called weights, are the numbers that training
# finds.)

small = mx.default_device() == mx.cpu  # without a GPU, the default model would take hours

if not small:  # edit these if you have a GPU
    ctx_len = 128  # context length: how many characters the model can see
    n_emb = 128  # embedding size: how many numbers stand for one character; a multiple of n_heads
    n_heads = 4  # attention heads per block
    n_layers = 3  # blocks
    dropout = 0.03  # fraction of numbers zeroed in training; raise it if the model overfits
    num_epochs = 20  # passes over the training set; lower it if the model overfits
    batch_size = 32  # rows of text per step; raise it for fewer, less noisy steps
    lr = 3e-3  # peak learning rate; lower it if the loss jumps around or becomes nan
else:  # edit these if you have none
    ctx_len = 48
    n_emb = 56
    n_heads = 7
    n_layers = 1
    dropout = 0.0
    num_epochs = 3
    batch_size = 8
    lr = 1e-2

warmup_steps = 100  # steps until the learning rate peaks; lower it if a run has few steps
weight_decay = 0.1  # how strongly weights are pulled toward 0; raise it if the model overfits
beta1 = 0.9  # decay rate of AdamW's average of the gradient
beta2 = 0.99  # decay rate of AdamW's average of the squared gradient
max_norm = 1.0  # a gradient longer than this is scaled down to it
seed = 0  # random seed

max_new_tokens = 1000  # length of the generated text, in characters
temperature = 0.8  # 0: always the most likely character; 1: unchanged; above 1: more random
top_k = 40  # sample only from the k most likely characters; try 5, or 1000 for all of them

# %% 2. Data
#
# All our data is one text file. The model learns from the first nine tenths of it, the *training
# set*. The last tenth, the *validation set*, is held out. Text that it has never seen shows whether
# the model learned the language (*generalization*) or merely memorized its training text
# (*overfitting*).


def load_text(path="input.txt"):
    """The text of a UTF-8 file. Raises OSError or UnicodeDecodeError if it cannot be read."""
    return Path(path).read_text(encoding="utf-8-sig")  # -sig: skip the byte order mark, if any


def split(text):
    """The first nine tenths of a text, and the last tenth. Works on arrays, too.

    >>> split("abcdefghij")
    ('abcdefghi', 'j')
    """
    boundary = len(text) * 9 // 10
    return text[:boundary], text[boundary:]


# %% 3. Tokenizer
#
# A neural network computes with numbers, so we turn each character into one, called a *token*:
# its index in the sorted list of all distinct characters, the *vocabulary*.
#
# GPT-2's own vocabulary has 50,257 tokens: words and pieces of words, found by *byte-pair
# encoding*. The same text then has fewer tokens. Single characters are simpler, and the model is
# the same.


class CharTokenizer:
    """Translates between text and tokens. The vocabulary is every character that occurs in text.

    >>> tokenizer = CharTokenizer("hello world")
    >>> tokenizer.vocab
    [' ', 'd', 'e', 'h', 'l', 'o', 'r', 'w']
    >>> tokenizer.encode("hold")
    [3, 5, 4, 1]
    >>> tokenizer.decode([3, 5, 4, 1])
    'hold'
    """

    def __init__(self, text):
        self.vocab = sorted(set(text))
        self.token_of = {char: token for token, char in enumerate(self.vocab)}

    def encode(self, text):
        """The tokens of a string, a list of ints. Raises KeyError for a character not in vocab."""
        return [self.token_of[char] for char in text]

    def decode(self, tokens):
        """The string that a list of tokens stands for."""
        return "".join(self.vocab[token] for token in tokens)


# %% 4. Batches
#
# The model is a *language model*: given the characters so far, it predicts the next one. So the
# *targets*, the right answers, are the text itself, shifted by one. The shipped text begins with
# "First Citizen:". If we cut the text into rows of T = 8 tokens, the first row is (_ is a space)
#
#     x = 18 47 56 57 58  1 15 47        F i r s t _ C i
#     y = 47 56 57 58  1 15 47 58        i r s t _ C i t
#
# One row holds T examples: after "F" comes "i", after "Fi" comes "r", and so on, up to "First Ci",
# after which comes "t". The model answers all T at once, one at each *position* of the row. B rows
# (*sequences*) form a *batch*, and do not interact.
#
# A batch is an *array*, a grid of numbers. Its *shape*, here (B, T), says how long it is along each
# *axis*. a[:, 0] is the first column: a colon alone takes everything along its axis.
#
# One pass over the training set is an *epoch*. If every epoch cut the text at the same places, the
# first token of a row would always be seen without the text before it. So each epoch starts cutting
# at a random place among the first T tokens, and takes the rows in random order.
#
# We cut the text with NumPy (np), and the model computes with MLX (mx).


def get_batches(tokens, ctx_len, batch_size, rng=None):
    """Yields (x, y), both (B, T) with T = ctx_len, where y holds the token after each one in x.

    tokens is a NumPy array of ints. For training, pass rng, a NumPy random generator: rows are cut
    and ordered at random, and rows that do not fill a batch are left out. For measuring, omit rng:
    all rows come in order, and the last batch may be smaller. Tokens at the end that do not fill a
    row are dropped.

    >>> for x, y in get_batches(np.arange(10, 20), ctx_len=4, batch_size=2):
    ...     print(np.array(x))
    ...     print(np.array(y))
    [[10 11 12 13]
     [14 15 16 17]]
    [[11 12 13 14]
     [15 16 17 18]]
    """
    starts = np.arange(0, len(tokens) - ctx_len, ctx_len)  # where the rows begin
    if rng is not None:
        # Drop the last row: shifted by the random start, it could run past the end.
        starts = rng.permutation(starts[:-1]) + rng.integers(ctx_len)
        starts = starts[: len(starts) // batch_size * batch_size]
    for i in range(0, len(starts), batch_size):
        rows = [tokens[s : s + ctx_len + 1] for s in starts[i : i + batch_size]]
        rows = np.stack(rows)  # (B, T + 1): one more, for the last target
        yield mx.array(rows[:, :-1]), mx.array(rows[:, 1:])  # (B, T) each


def count_batches(tokens, ctx_len, batch_size):
    """How many batches get_batches() makes with an rng. The learning rate will depend on it."""
    rows = (len(tokens) - 1) // ctx_len  # - 1, since the last row needs one more token as a target
    return (rows - 1) // batch_size  # - 1 for the row that is dropped


# %% 5. Loss and learning
#
# Before we build the model, let's decide how to judge it. At each position it gives each of the V
# tokens of the vocabulary a number, called a *logit*: the higher, the more likely the token is to
# come next. *Softmax* turns the V logits, s_1 to s_V, into a probability distribution: positive
# numbers that sum to 1.
#
#     p_i = exp(s_i) / (exp(s_1) + ... + exp(s_V))        (2, 1, 0) -> (0.67, 0.24, 0.09)
#
# The *loss* is -ln p, where p is the probability that the model gave to the token that came next:
#
#     p        1       0.22     1/65      0.001
#     loss     0       1.5      4.17      6.9
#
# Why a logarithm? The probability of a whole text is the product of the probabilities of its
# tokens, each given those before it: if "F" has probability 1/2, and "i" after it 1/4, then "Fi"
# has 1/8. A logarithm turns the product into a sum: the lower the sum of the losses, the more
# likely the model finds the text. The mean loss per token is the *cross-entropy*, in nats (for
# natural logarithm). exp(loss) is the *perplexity*: at a loss of 1.5 the model is as unsure as if
# it chose among exp(1.5) = 4.5 equally likely characters.
#
# What is a good loss? Uniform guessing among 65 characters gives ln 65 = 4.17. The classic baseline
# is an *n-gram model*, which counts what followed each string of n - 1 characters in the training
# set. If "e" followed "th" 60 times out of 100, then p is about 0.6 for an "e" after "th". A
# character that it never saw there would have p = 0 and an infinite loss, so *smoothing* moves a
# little probability from what was seen to what shorter strings predict. On the shipped text:
#
#     n        1       2       3       4       5       6       7
#     loss     3.24    2.36    1.83    1.51    1.38    1.34    1.33
#
# The small model will come close to n = 4, and the default model will beat all of them.


def loss_fn(model, x, y):
    """The mean cross-entropy, a scalar array, in nats per token. x and y are (B, T).

    evaluate() in section 9 uses this function, too. If you add a term meant only for training,
    keep a copy without it for evaluate().
    """
    logits = model(x)  # (B, T, V)
    return nn.losses.cross_entropy(logits, y, reduction="mean")  # softmax, -ln p, mean


# To *learn* is to change the parameters so that the loss falls. Take a model with one parameter, w,
# for a language of two letters. The logit of "a" is w and the logit of "b" is 0, so the probability
# of "a" is p = exp(w) / (exp(w) + 1). In the training text, 3 of 4 letters are "a". Then the loss
# is -(3/4) ln p - (1/4) ln(1 - p).
#
# Which way should w go? At w = 0 the loss is 0.6931. If we raise w by 0.001, the loss changes by
# -0.00025. The ratio -0.00025 / 0.001 = -0.25 is the slope, or *gradient*: how fast the loss grows
# as w grows. It is negative, so we raise w. *Gradient descent* moves w a little against its
# gradient, again and again. With w = w - 2 * gradient, where 2 is the *learning rate*,
#
#     w           0        0.5      0.755    0.895    ...   1.099
#     p           0.5      0.622    0.680    0.710    ...   0.75
#     loss        0.6931   0.5991   0.5740   0.5664   ...   0.5623
#     gradient   -0.25    -0.128   -0.070   -0.040    ...   0
#
# w settles where p is 3/4, the true share of "a". The loss cannot reach 0: which letter comes next
# is partly chance. With a learning rate of 20, the first step overshoots to w = 5, and the loss
# there is 1.26, worse than at the start.
#
# A real model has far too many parameters to nudge one by one. *Backpropagation* finds all
# gradients in one pass, backward from the loss. (Computing the loss is the *forward pass*, and this
# is the *backward pass*.) Each operation has a known rule for its own slope, such as 2 * x for
# x * x, and by the *chain rule* slopes multiply.
#
#         slope 3       slope -2
#     w ----------> z ----------> loss          gradient for w: 3 * -2 = -6
#
# Suppose z grows 3 times as fast as w, and the loss falls 2 times as fast as z grows. Then the loss
# falls 6 times as fast as w grows. The -2 is found once, and used again for every parameter that z
# depends on. Where a number is used in several places, its slopes add: 3 * w + 2 * w has slope 5.

# %% 6. Attention
#
# From here on we build the model. We pass its sizes to all its parts in one object.


@dataclass  # writes __init__ for us
class GPTConfig:
    """The sizes of a model, and its dropout."""

    vocab_size: int
    ctx_len: int
    n_emb: int
    n_heads: int
    n_layers: int
    dropout: float


# Inside the model, each position has a *vector*, a list of n_emb numbers. At first it describes
# only this position's own character and place (section 8). To predict what comes next, a position
# needs information from those before it. The simplest way to get it is to average their vectors
# with its own. Here are the *attention weights*, the shares in the average, for three positions.
# (They are not parameters.) Each row belongs to the position that looks, and each column to one
# that it looks at:
#
#     1    0    0          = softmax(0, -inf, -inf)
#     1/2  1/2  0          = softmax(0,    0, -inf)
#     1/3  1/3  1/3        = softmax(0,    0,    0)
#
# The numbers that go into softmax here are called *scores*. Equal scores get equal weights, and a
# score of -inf gets no weight, because exp(-inf) = 0. The -infs form the *causal mask*. It hides
# the future, which holds the very answer we ask for. A model that saw it would learn to copy, but
# during generation there is nothing on the right to copy.
#
# *Self-attention* keeps the mask and computes the other scores from the vectors themselves, by two
# operations. The *dot product* of two vectors is the sum of the products of their entries: (1, 2)
# and (3, 4) give 1 * 3 + 2 * 4 = 11. It is large if the two point the same way. The product x @ M
# of a vector and a *matrix*, a table of numbers, is a new vector: the dot products of x with each
# column of M. If x is a matrix itself, this is done with each of its rows. Three matrices of
# parameters turn each vector into three shorter ones, of head_size numbers:
#
#     *query*    what I am looking for           *key*      what others can find me by
#     *value*    what I pass on to those who find me
#
# The score of one position for another is the dot product of its query and the other's key. So
# q @ k.mT computes all scores at once (.mT turns rows into columns). They are divided by
# sqrt(head_size), for a reason given below. Softmax turns each row of scores into attention
# weights, and weights @ v averages the values.


def attention_weights(q, k):
    """softmax(q @ k.mT / sqrt(head_size)), with the future masked.

    q is (..., T, head_size), k is (..., S, head_size), and the result is (..., T, S), with a row
    for each query and a column for each key. Each row sums to 1. The dots stand for any leading
    axes. In training, T = S. In section 10, the T queries belong to the last T of S positions.
    (Vaswani et al., Attention Is All You Need, 2017, equation 1)

    >>> q = mx.array([[1.0, 0.0], [3.0, 0.0], [0.0, 3.0]])  # T = 3 positions, head_size = 2
    >>> k = mx.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> v = mx.array([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]])
    >>> weights = attention_weights(q, k)
    >>> print(np.array(weights).round(2))
    [[1.   0.   0.  ]
     [0.89 0.11 0.  ]
     [0.06 0.47 0.47]]
    >>> print(np.array(weights @ v).round(1))
    [[10.   0. ]
     [ 8.9  1.1]
     [ 2.9  7.1]]

    The second query, (3, 0), fits the first key, (1, 0), so the second position mostly gets the
    first value. The third one gets 0.06 of (10, 0), 0.47 of (0, 10), and 0.47 of (5, 5).
    """
    T, S = q.shape[-2], k.shape[-2]
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (..., T, S)
    # [:, None] makes a column of the T positions that look. Comparing it with a row of S positions
    # stretches both to (T, S), by *broadcasting*. For T = S = 2:
    # [[0], [1]] < [0, 1] is [[False, True], [False, False]]. True is what must not be seen.
    is_later = mx.arange(S - T, S)[:, None] < mx.arange(S)  # (T, S)
    scores = mx.where(is_later, -mx.inf, scores)  # (..., T, S)
    return mx.softmax(scores, axis=-1)  # along each row


# Why are the scores *scaled*, that is, divided by sqrt(head_size)? The *variance* of numbers with
# mean 0 is the mean of their squares. Its square root, the *standard deviation*, says how large
# they typically are. Suppose the entries of queries and keys are independent, with mean 0 and
# variance 1. Then each product in a score has variance 1, too, and the variances of independent
# numbers add up (two facts of statistics). A score is a sum of head_size products, so it has
# variance head_size, and is typically sqrt(head_size) away from 0. If one score is that large and
# another is 0, the first takes nearly all of the weight (softmax *saturates*):
#
#     head_size              1        8        32       128
#     sqrt(head_size)        1        2.83     5.66     11.31
#     softmax(that, 0)[0]    0.731    0.944    0.997    1.000
#
# At 1.000 a nudge to any score changes next to nothing. With hardly any gradient, queries and keys
# hardly learn. With scores divided by the root, we get 0.731 for any head_size. (Experiment 9 in
# the README leaves the root out.)
#
# All this together is an attention *head*. It makes one average for each position, so it can look
# for one kind of thing. We want n_heads of them, to look for several kinds. Each head reads the
# whole vector, but its queries, keys, and values have only head_size = n_emb / n_heads numbers. The
# heads' outputs are *concatenated*, which gives n_emb numbers again.
#
# In MLX, a part of a model is a class derived from nn.Module, and calling the object runs its
# __call__ method.


class MultiHeadAttention(nn.Module):
    """Causal multi-head self-attention: (B, T, n_emb) to (B, T, n_emb).

    One matrix holds the query matrices of all heads side by side. It computes all queries at once,
    an array of shape (B, T, n_emb), which is then split by head. Keys and values work the same way.
    The @ operator works on the last two axes and is repeated over all axes before them. So heads
    must come before positions:

        (B, n_heads, T, head_size) @ (B, n_heads, head_size, T) = (B, n_heads, T, T)

    MLX has this as one fast function, mx.fast.scaled_dot_product_attention. We write it out because
    it is what we came to see, and because the fast function does not return the weights that --look
    draws.
    """

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        # nn.Linear(n, m) turns vectors of n numbers into vectors of m numbers: it multiplies by a
        # matrix and adds m more parameters, called *biases*.
        self.q_proj = nn.Linear(config.n_emb, config.n_emb)
        self.k_proj = nn.Linear(config.n_emb, config.n_emb)
        self.v_proj = nn.Linear(config.n_emb, config.n_emb)
        self.c_proj = nn.Linear(config.n_emb, config.n_emb)  # projection: mixes what heads found
        # (The bias of k_proj has no effect. It adds the same number, the dot product of query and
        # bias, to all scores in a row, which leaves softmax unchanged. GPT-2 has it anyway.)
        #
        # *Dropout* sets a random fraction of its input to 0 and scales up the rest to make up for
        # it. Then no part of the model can rely on any single number, which makes memorizing
        # harder. It acts only in training: model.train() turns it on; model.eval() turns it off.
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)  # residual: section 7

    def split_heads(self, x):
        """(B, T, n_emb) to (B, n_heads, T, head_size).

        The transpose at the end matters: it puts the axes in this order. Here four positions
        have two numbers each, for two heads of size 1. Each printed row belongs to a head.

        >>> x = np.arange(8).reshape(4, 2)  # the positions have (0, 1), (2, 3), (4, 5), (6, 7)
        >>> print(x.reshape(4, 2, 1).transpose(1, 0, 2)[:, :, 0])  # right: a part of each position
        [[0 2 4 6]
         [1 3 5 7]]
        >>> print(x.reshape(2, 4, 1)[:, :, 0])  # wrong: all of two positions
        [[0 1 2 3]
         [4 5 6 7]]
        """
        B, T, n_emb = x.shape
        x = x.reshape(B, T, self.n_heads, n_emb // self.n_heads)  # (B, T, n_heads, head_size)
        return x.transpose(0, 2, 1, 3)  # (B, n_heads, T, head_size)

    def __call__(self, x, cache=None):
        q = self.split_heads(self.q_proj(x))  # (B, n_heads, T, head_size)
        k = self.split_heads(self.k_proj(x))  # (B, n_heads, T, head_size)
        v = self.split_heads(self.v_proj(x))  # (B, n_heads, T, head_size)
        # (To try rotary position embeddings (RoPE), rotate q and k here. The first position is
        # cache.offset, or 0 without a cache.)
        if cache is not None:  # only in section 10: keys and values of earlier positions
            k, v = cache.update_and_fetch(k, v)  # (B, n_heads, S, head_size)
        weights = attention_weights(q, k)  # (B, n_heads, T, S)
        out = self.attn_dropout(weights) @ v  # (B, n_heads, T, head_size)
        out = out.transpose(0, 2, 1, 3)  # (B, T, n_heads, head_size)
        out = out.reshape(x.shape)  # (B, T, n_emb): the heads side by side
        return self.resid_dropout(self.c_proj(out))


# %% 7. MLP and block
#
# Attention moves information between positions. Then the *MLP* (multilayer perceptron, also called
# a feed-forward network) works on what has arrived, at each position by itself. It is two linear
# layers (nn.Linear) with an *activation function* between them, one whose graph is not a straight
# line. Without it the two could do no more than one: (x @ M) @ N = x @ (M @ N), and M @ N is just
# another matrix. Many functions would do. The simplest, max(0, x), is called *ReLU*. GPT-2 uses
# *GELU*, which is smooth: x times the probability that a standard normal random number (bell curve,
# mean 0, variance 1) is below x.
# (Hendrycks and Gimpel, Gaussian Error Linear Units, 2016)
#
#     x           -3       -0.75    0        1        3
#     gelu(x)     -0.004   -0.170   0        0.841    2.996
#
# The first layer, c_fc ("fully connected"), makes 4 * n_emb numbers, like answers to that many
# small questions about the vector. The second, c_proj, combines the answers into a change of the
# vector. The factor of 4 is a convention, and the c_ is left over from GPT-2's code. GPT-2 computes
# GELU by a formula that is off by less than 0.0005. In MLX it is called gelu_approx.


class MLP(nn.Module):
    """Linear, GELU, linear: (B, T, n_emb) to (B, T, n_emb)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_emb, 4 * config.n_emb)
        self.c_proj = nn.Linear(4 * config.n_emb, config.n_emb)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(self, x):
        x = nn.gelu_approx(self.c_fc(x))  # (B, T, 4 * n_emb)
        return self.dropout(self.c_proj(x))  # (B, T, n_emb)


# A *block* is one attention layer and one MLP. (n_layers counts the blocks.)
#
#     x ---+---------------------->(+)---+---------------->(+)---> x
#          |                        ^    |                  ^
#          +--> ln_1 --> attention -+    +--> ln_2 --> MLP -+
#
# What a layer computes is added to x and does not replace it (a *residual* or *skip connection*).
# So a layer only has to learn what to change. The vector that flows straight through all blocks is
# called the *residual stream*. It also carries the gradient back to the first block. In a plain
# chain of layers, slopes multiply: after twelve layers with slopes of 1/2, only 1/4096 of the
# gradient is left (*vanishing gradient*). But the slope of x + f(x) is 1 plus the slope of f.
# Thanks to the 1, the gradient also has a path along the stream that no layer shrinks.
# (He et al., Deep Residual Learning for Image Recognition, 2015)
#
# As layer after layer adds to it, the stream grows. With it, the scores in attention would grow
# until softmax saturated. *LayerNorm* keeps the input of each layer at the same scale. It shifts
# and scales each vector, independently of the others, to mean 0 and variance 1:
#
#     x                                   1        2        6
#     minus the mean, 3                  -2       -1        3
#     divided by the root of 14/3        -0.93    -0.46     1.39        14/3 = (4 + 1 + 9) / 3
#
# Then it multiplies each number by a learned *gain* and adds a learned bias. In GPT-2 it sits at
# the start of each side branch, not on the stream itself (*pre-norm*).
# (Ba et al., Layer Normalization, 2016)


class Block(nn.Module):
    """Attention, then MLP, each added to x: (B, T, n_emb) to (B, T, n_emb)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_emb)
        self.mha = MultiHeadAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_emb)
        self.mlp = MLP(config)

    def __call__(self, x, cache=None):
        x = x + self.mha(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


# %% 8. GPT
#
# How does a character become a vector? The model has a table, the *token embedding* wte, with a row
# of n_emb learned numbers for each token. It simply looks the row up. Characters that behave alike
# get similar rows.
#
# The vector must also say where the character stands. A weighted average ignores order. Without
# positions, the first attention layer would give the "a" of "tea" and the "a" of "eta" the same
# output: each averages over an e, a t, and an a. So there is a second table, the *position
# embedding* wpe, with a row for each position, and the two rows are added. This is why the model
# cannot see more than ctx_len characters: wpe has no more rows.
#
# After the blocks come a last LayerNorm, ln_f ("final"), and the *output head* (not to be confused
# with attention heads), which makes the logits. The logit of a token is the dot product of the
# position's vector with that token's row of wte: a vector that resembles the row predicts the
# token. Using one table at both ends saves parameters and works well (*weight tying*; Press and
# Wolf, Using the Output Embedding to Improve Language Models, 2016).
#
# The matrices start out random. If all their entries were equal, the numbers that a layer makes
# would also be equal, get equal gradients, and stay equal: many numbers doing the work of one. The
# weights start small, so that all probabilities are nearly equal, and the model does not first have
# to unlearn a wrong preference. The first loss must be close to ln vocab_size, or something is
# wrong.
# (It is a little above: the stream contains the current token's own row of wte, and the dot product
# of a row with itself is always positive. So the model slightly favors repeating that token.)


class GPT(nn.Module):
    """model(tokens) turns (B, T) tokens into (B, T, vocab_size) logits, for any T up to ctx_len."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_emb)
        self.wpe = nn.Embedding(config.ctx_len, config.n_emb)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = [Block(config) for _ in range(config.n_layers)]
        self.ln_f = nn.LayerNorm(config.n_emb)
        # parameters() is a tree (nested dicts and lists) of arrays. tree_map_with_path calls
        # init_weight(name, array) for each, and update() puts the results in their place.
        self.update(tree_map_with_path(self.init_weight, self.parameters()))

    def init_weight(self, name, weight):
        """The initial value of the parameter with this name, such as blocks.0.mha.c_proj.weight.

        It replaces MLX's own initial values, including those of layers you add.
        """
        if name.endswith("bias"):
            return mx.zeros_like(weight)
        if weight.ndim == 1:  # the gains of LayerNorm
            return mx.ones_like(weight)
        std = 0.02  # GPT-2's standard deviation (but OpenAI's code has 0.01 for wpe)
        if name.endswith("c_proj.weight"):
            # Each block adds the outputs of two c_proj layers to the residual stream. A sum of N
            # independent numbers is typically sqrt(N) times as large as each. Dividing by sqrt(N)
            # makes up for it.
            std = 0.02 / math.sqrt(2 * self.config.n_layers)
        return mx.random.normal(weight.shape, scale=std)

    def __call__(self, tokens, caches=None):
        if caches is None:
            caches = [None] * len(self.blocks)
            start = 0
        else:  # only in section 10: the positions before `start` have been read already
            start = caches[0].offset
        end = start + tokens.shape[1]
        if end > self.config.ctx_len:
            raise ValueError(f"{end} tokens are more than ctx_len = {self.config.ctx_len}")
        positions = mx.arange(start, end)  # (T,)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, n_emb) + (T, n_emb)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i])  # (B, T, n_emb)
        x = self.ln_f(x)
        return self.wte.as_linear(x)  # x @ wte.T: (B, T, vocab_size)


# With the default settings and 65 characters, the parameters are
#
#     wte          65 x 128                                    8,320
#     wpe         128 x 128                                   16,384
#     a block     ln_1 and ln_2                  512                       4 x 128
#                 mha: q, k, v            3 x 16,512                       128 x 128 + 128 each
#                      c_proj                 16,512
#                 mlp: c_fc                   66,048
#                      c_proj                 65,664
#                                            198,272   x 3   594,816
#     ln_f                                                       256
#                                                            619,776
#
# So nearly all of them are in the blocks, and two thirds of a block is its MLP. The smallest GPT-2
# has n_emb = 768, 12 heads, 12 blocks, ctx_len = 1024, and 50,257 tokens: 124 million parameters.
# It differs from this model only in size, tokens, and training, so OpenAI's weights can be loaded
# into this class. The README shows how.
# (Radford et al., Language Models are Unsupervised Multitask Learners, 2019)


def count_parameters(model):
    """The number of parameters.

    >>> count_parameters(GPT(GPTConfig(65, 128, 128, 4, 3, dropout=0.0)))
    619776
    """
    return sum(weight.size for _, weight in tree_flatten(model.parameters()))


# %% 9. Training
#
# A training step takes a batch and moves every parameter against its gradient. The gradient of the
# batch is the mean over its examples: what would help only one of them mostly cancels out, and what
# helps many remains. Since the batch is random, this is *stochastic* gradient descent.
#
# How far should a parameter move? Plain steps of lr * gradient, as in section 5, rarely suit all
# parameters: gradients differ in size by orders of magnitude. *Adam* brings them to one scale. For
# each parameter it keeps two moving averages, the first and second *moments*: m of its gradient g,
# and v of the square of g. (This v has nothing to do with values.)
#
#     m = beta1 * m + (1 - beta1) * g
#     v = beta2 * v + (1 - beta2) * g * g
#     w = w - lr * m / sqrt(v)
#
# sqrt(v) is the typical size of g, so dividing by it cancels the size. As long as g stays the same,
# whether it is 0.001 or 10, m / sqrt(v) is 1, and w moves by lr. If g alternates between 1 and -1,
# the terms of m mostly cancel while v stays 1, and the ratio is only 0.05. With random signs it is
# typically 0.23. So a parameter on which the batches disagree moves little. (m and v start at 0, so
# they are too small at first. *Bias correction* scales them up. A tiny number added to sqrt(v)
# avoids division by 0.)
#
# AdamW adds *weight decay*: each step also shrinks w by lr * weight_decay * w. So a weight stays
# large only if its gradient keeps it large. With large weights, a model can react sharply to small
# details, which can help it to memorize. (Kingma and Ba, Adam, 2014; Loshchilov and Hutter,
# Decoupled Weight Decay Regularization, 2017)


def make_optimizer(total_steps):
    r"""AdamW for a run of total_steps steps, with *warmup* and *linear decay* of the learning rate:

        lr           /\
                   /    `-.
        0        /          `-.
                 0  warmup     total_steps

    Early on, m and v come from only a few noisy gradients. In the first step, m / sqrt(v) is 1 or
    -1, however small g is. Without warmup, every parameter would move by the full lr in a mostly
    random direction. At the end, a constant rate would keep the parameters jumping around the goal,
    since m / sqrt(v) does not shrink with the gradients.
    """

    # AdamW calls this in each step. If you try another schedule: step is an unsigned mx.array, so
    # step - 100 would wrap around below 0. The result must be an mx.array, too. For half a cosine
    # wave:
    #     fall = (1 + mx.cos(math.pi * step / total_steps)) / 2
    # For a constant rate after the warmup: return lr * mx.minimum(rise, 1)
    def learning_rate(step):
        rise = (step + 1) / max(1, warmup_steps)
        fall = mx.maximum(0, 1 - step / total_steps)
        return lr * mx.minimum(rise, fall)

    # Only the matrices of the blocks are decayed. Biases, gains, and embeddings are left alone.
    # MultiOptimizer gives the first optimizer what is_decayed picks, and the second one the rest.
    def is_decayed(name, weight):
        return name.startswith("blocks") and weight.ndim == 2

    betas = [beta1, beta2]
    decayed = optim.AdamW(learning_rate, betas, weight_decay=weight_decay, bias_correction=True)
    others = optim.AdamW(learning_rate, betas, weight_decay=0.0, bias_correction=True)
    return optim.MultiOptimizer([decayed, others], [is_decayed])


# Before we write the training step, here are three ideas behind MLX:
#
# *Lazy evaluation*. `a + b` computes nothing yet: it adds a node to a *computation graph*. The work
# is done when a value is needed, by .item() or print, or when mx.eval demands it. So MLX sees a
# whole step before it computes any of it. A loop that never asked for a value would only grow
# the graph.
#
# *Automatic differentiation*. nn.value_and_grad turns loss_fn into a function that returns the loss
# and its gradients by backpropagation, in a tree like that of model.parameters().
#
# *Compilation*. mx.compile *traces* a function. On the first call, and whenever the inputs have new
# shapes or types, it runs the Python code and records the operations. Every other call replays the
# recording. That is faster: Python has nothing to do, and small operations are merged. Inside step,
# this means:
#
#     print("hello")                 prints only during recording
#     print(loss.item())             fails: during recording, there is no value yet
#     max_norm, changed later        keeps its old value
#     dropout                        stays on if it was on in the first call
#     parameters, m, v, step count   do change: they are in the list `state` below
#     learning rate, randomness      do change, for the same reason
#
# While you experiment with step, return it uncompiled: `return step`. If it fails during recording,
# some parameters may no longer hold numbers: restart Python.


def make_step(model, optimizer, loss_fn):
    """Returns a function step(x, y), which trains the model on a batch and returns its loss.

    loss_fn is the one from section 5, or another with the same arguments.
    """
    loss_and_grad = nn.value_and_grad(model, loss_fn)

    def step(x, y):
        loss, grads = loss_and_grad(model, x, y)
        grads = nn.average_gradients(grads)  # over several processes, if there are any (section 13)
        # *Gradient clipping*: if all gradients together, as one vector, are longer than max_norm,
        # they are scaled down to it. Otherwise one odd batch would linger in m and v.
        grads, _ = optim.clip_grad_norm(grads, max_norm)
        optimizer.update(model, grads)
        return loss

    # Everything step reads or changes, apart from x and y. In each call, the compiled step takes
    # the current values from here, and puts the new ones back.
    state = [model.state, optimizer.state, mx.random.state]
    return mx.compile(step, inputs=state, outputs=state)


# A training run is then just this. (The real loop, in section 13, also saves and reports.)
#
#     for epoch in range(num_epochs):
#         model.train()  # dropout on for the first call of step, and for an uncompiled step
#         for x, y in get_batches(train_tokens, ctx_len, batch_size, rng):
#             loss = step(x, y)
#             mx.eval(loss, model.state, optimizer.state)
#         print(evaluate(model, val_tokens, loss_fn))
#
# While the loss falls on both sets, keep training. If it falls on the training set and rises on the
# validation set, the model overfits: use more text, more dropout, fewer epochs, or a smaller model.
# (We keep the weights of the best epoch and report its loss. Because it is the lowest of several
# on the same text, it is slightly optimistic. Strictly, you would hold out another part, a *test
# set*.)


def evaluate(model, tokens, loss_fn):
    """The mean loss over all rows of tokens, in nats per token. Leaves the model in eval mode."""
    model.eval()  # dropout off
    total = count = 0
    for x, y in get_batches(tokens, model.config.ctx_len, batch_size):
        total += loss_fn(model, x, y).item() * y.size  # the last batch can be smaller
        count += y.size
    return total / count


# %% 10. Sampling
#
# Using a trained model is called *inference*. A language model generates one token at a time, and
# each is fed back in (*autoregressive* generation):
#
#     for _ in range(100):
#         logits = model(mx.array([tokens[-ctx_len:]]))  # (1, T, vocab_size)
#         tokens.append(sample(logits[0, -1]))  # the last position predicts what comes next
#
# How do we choose the token? If we always take the most likely one (*greedy decoding*), the text
# soon starts repeating itself. So we draw one at random, with the model's probabilities. We first
# divide the logits by a *temperature*: below 1 it makes the choice more cautious, above 1 bolder.
#
#     logits             2      1      0
#     temperature 0.5    0.87   0.12   0.02
#     temperature 1      0.67   0.24   0.09
#     temperature 2      0.51   0.31   0.19
#
# *Top-k sampling* draws from the k most likely tokens only. Each of the others is unlikely, but
# there are many, so now and then one would be drawn and derail the text. (Among 65 characters, a k
# of 40 hardly matters.)


def sample(logits, temperature=1.0, top_k=None):
    """Draws a token, an int, from logits (vocab_size,).

    temperature=0 is greedy. With top_k, only the top_k most likely tokens can be drawn.
    """
    if temperature == 0:
        return mx.argmax(logits).item()
    candidates = mx.argsort(-logits)[:top_k]  # (top_k,) tokens, the most likely first
    choice = mx.random.categorical(logits[candidates] / temperature)  # softmax, then a draw
    return candidates[choice].item()


# The loop above runs all the text through the model again for each new token. But because of the
# causal mask, a new token cannot affect earlier positions: their vectors, keys, and values stay the
# same in every block. So we store the keys and values, in a *KV cache* (key/value cache), and run
# only the new token through the model. Its query meets all S stored keys. Old queries are not
# needed again: what they found has already gone into the keys and values of the later blocks.
#
#     what goes through the model     without a cache     with a cache
#     first, the prompt "To be"       T o _ b e           T o _ b e
#     then the new character ","      T o _ b e ,         ,


class KVCache:
    """The keys and values of all positions that one attention layer has read."""

    def __init__(self):
        self.keys = None
        self.values = None
        self.offset = 0  # positions stored so far; also the position of the next token

    def update_and_fetch(self, k, v):
        """Appends k and v, (B, n_heads, T, head_size) each, and returns all S positions of both.

        Before the call, the offset is the position of the first new token; afterward it is S.
        """
        if self.offset > 0:
            k = mx.concatenate([self.keys, k], axis=2)  # (B, n_heads, S, head_size)
            v = mx.concatenate([self.values, v], axis=2)  # (B, n_heads, S, head_size)
        self.keys = k
        self.values = v
        self.offset = k.shape[2]
        return k, v


def generate(model, tokens, max_new_tokens, temperature=1.0, top_k=None):
    """Yields max_new_tokens tokens, one by one, that continue a list of at least one token.

    Puts the model in eval mode. If you call this in the middle of an epoch, call model.train()
    afterward.
    """
    model.eval()
    ctx_len = model.config.ctx_len
    window = list(tokens)[-ctx_len:]  # the tokens that the model sees
    unread = window  # those of them that are not in the caches yet
    caches = [KVCache() for _ in model.blocks]
    for _ in range(max_new_tokens):
        logits = model(mx.array([unread]), caches)  # (1, T, vocab_size)
        token = sample(logits[0, -1], temperature, top_k)
        yield token
        window = window + [token]
        unread = [token]
        if len(window) > ctx_len:
            # All positions are taken. If we dropped just one token, as the simple loop does, all
            # the others would move to new positions and have to be read again, for every new token.
            # Dropping half makes that rare.
            window = window[-max(1, ctx_len // 2) :]  # the newer half
            unread = window
            caches = [KVCache() for _ in model.blocks]


# %% 11. Checks and files
#
# You have now seen all of GPT-2. What follows puts it to use. This section checks the settings and
# saves models to files, section 12 shows what a model does, and section 13 has the training loop.

MODEL = "model.safetensors"  # the best weights of this run
FORMER = "former.safetensors"  # the best weights of the previous run
CHECKPOINT = "checkpoint.safetensors"  # what --resume needs
RUN_LOG = "runs.jsonl"  # one line about each finished run
COMPLETIONS = "completions.txt"  # the text generated at the end of a run


class UserError(Exception):
    """An error the user can fix. main() shows it on one line, without a traceback."""


# For each setting: its type, its smallest value, and the value it must stay below. Add a setting of
# your own here, too (a number; for a switch, 0 or 1). Then it is checked, noted in the run log, and
# compared by --resume.
LIMITS = {
    "ctx_len": (int, 1, math.inf),
    "n_emb": (int, 1, math.inf),
    "n_heads": (int, 1, math.inf),
    "n_layers": (int, 1, math.inf),
    "dropout": (float, 0, 1),
    "num_epochs": (int, 1, math.inf),
    "batch_size": (int, 1, math.inf),
    "lr": (float, 0, math.inf),
    "warmup_steps": (int, 0, math.inf),
    "weight_decay": (float, 0, math.inf),
    "beta1": (float, 0, 1),
    "beta2": (float, 0, 1),
    "max_norm": (float, 0, math.inf),
    "seed": (int, 0, 2**32),
    "max_new_tokens": (int, 1, math.inf),
    "temperature": (float, 0, math.inf),
    "top_k": (int, 1, math.inf),
}


def check_settings():
    """The settings of section 1, as a dict. Raises UserError if one cannot be used."""
    settings = {}
    for name, (kind, smallest, below) in LIMITS.items():
        value = globals()[name]  # the variable of that name
        allowed = (int,) if kind is int else (int, float)  # not True, which isinstance would allow
        if type(value) not in allowed or not smallest <= value < below:
            raise UserError(f"{name} = {value!r} must be of type {kind.__name__}, "
                            f"at least {smallest} and below {below}")
        settings[name] = value
    if n_emb % n_heads != 0:
        raise UserError(f"n_emb = {n_emb} must be a multiple of n_heads = {n_heads}")
    return settings


def changes(old, new):
    """The differences between two dicts of settings, in words.

    >>> changes({"lr": 0.01, "seed": 0}, {"lr": 0.001, "seed": 0})
    'lr 0.01 to 0.001'
    """
    different = [name for name in new if old.get(name) != new[name]]
    return ", ".join(f"{name} {old.get(name)} to {new[name]}" for name in different)


def unfinished(path):
    """The name for a file while it is being written.

    Once it is complete, os.replace() gives it its real name. So a run that is stopped in the middle
    leaves no half-written file under that name. (getpid() keeps the unfinished files of two runs
    apart. They share the finished ones, so train only one model in a folder at a time. The ending
    stays, because MLX appends .safetensors to any other.)
    """
    path = Path(path)
    return str(path.with_name(f"unfinished-{os.getpid()}-{path.name}"))


def save_text(path, text):
    """Writes a text file."""
    Path(unfinished(path)).write_text(text, encoding="utf-8", newline="\n")  # on Windows, too
    os.replace(unfinished(path), path)


def save(path, tree, notes):
    """Writes a tree of arrays and a dict of notes to a safetensors file.

    Such a file holds arrays by name, so the tree is flattened: the array in tree["a"]["b"] is named
    "a.b". Raises UserError if it cannot be written.
    """
    arrays = dict(tree_flatten(tree))
    try:
        mx.save_safetensors(unfinished(path), arrays, {"notes": json.dumps(notes)})
    except RuntimeError as error:  # the disk is full, for example
        Path(unfinished(path)).unlink(missing_ok=True)
        raise UserError(f"{path} could not be saved: {error}") from None
    os.replace(unfinished(path), path)


def load(path):
    """The tree and the notes that save() wrote. Raises UserError if they cannot be read."""
    if not os.path.exists(path):
        raise UserError(f"there is no {path} yet: run python train.py first")
    try:
        arrays, metadata = mx.load(path, return_metadata=True)
        notes = json.loads(metadata["notes"])
    except (RuntimeError, KeyError, ValueError):
        raise UserError(f"{path} is damaged, or train.py did not write it") from None
    return tree_unflatten(arrays), notes


def shapes(tree):
    """The shape of each array in a tree, by its name."""
    return {name: array.shape for name, array in tree_flatten(tree)}


def check_match(path, saved, ours):
    """Raises UserError unless the tree saved in path has the names and shapes of our tree."""
    if shapes(saved) != shapes(ours):
        raise UserError(f"{path} does not match train.py: undo your edits, or train again")


def save_model(path, model, tokenizer):
    """Saves the weights, and beside them what load_model() needs to build the model."""
    notes = {"config": asdict(model.config), "vocab": "".join(tokenizer.vocab)}
    save(path, model.parameters(), notes)


def load_model(path=MODEL):
    """A saved model, in eval mode, and its tokenizer. Raises UserError."""
    weights, notes = load(path)
    try:
        config = GPTConfig(**notes["config"])  # the entries of the dict become the arguments
    except (KeyError, TypeError):
        raise UserError(f"{path} holds no model that this train.py can load") from None
    model = GPT(config)
    check_match(path, weights, model.parameters())
    model.update(weights)
    model.eval()
    return model, CharTokenizer(notes["vocab"])


# %% 12. Prompts and pictures


def check_prompt(tokenizer, prompt):
    """Raises UserError at a character that the model does not know."""
    for char in prompt:
        if char not in tokenizer.token_of:
            known = "".join(tokenizer.vocab[:100])
            raise UserError(f"the model does not know {char!r}, only {known!r}")


def first_char(tokenizer):
    """The default prompt: the first character in the vocabulary, usually the newline."""
    return tokenizer.vocab[0]


def continue_text(model, tokenizer, prompt, length):
    """Yields `length` characters that continue the prompt. The same seed gives the same text.

    Sets MLX's random seed and, like generate(), puts the model in eval mode.
    """
    mx.random.seed(seed)
    for token in generate(model, tokenizer.encode(prompt), length, temperature, top_k):
        yield tokenizer.decode([token])


def type_out(prompt):
    """Prints the prompt, and then each character as the saved model generates it."""
    check_settings()
    model, tokenizer = load_model()
    check_prompt(tokenizer, prompt)
    print(prompt, end="", flush=True)
    for char in continue_text(model, tokenizer, prompt or first_char(tokenizer), max_new_tokens):
        print(char, end="", flush=True)
    print()


def one_line(text):
    """The text with newlines shown as ⏎, and without characters that would move the cursor."""
    text = text.replace("\n", "⏎")
    return "".join(char if char.isprintable() else " " for char in text)


def bars(shares):
    """A row of bars, one for each number from 0 to 1.

    >>> bars([0.1, 0.5, 1.0])
    '▁▄█'
    """
    heights = [round(8 * min(share, 1)) for share in shares]  # whole numbers from 0 to 8
    return "".join(" ▁▂▃▄▅▆▇█"[height] for height in heights)


class Recorder(nn.Module):
    """A layer that returns its input, and keeps it. look() puts it in place of dropout."""

    def __call__(self, x):
        self.recorded = x
        return x


def look(prompt):
    """Draws how surprising each character is, what each head attends to, and what comes next."""
    model, tokenizer = load_model()
    check_prompt(tokenizer, prompt)
    tokens = tokenizer.encode(prompt)
    ctx_len = model.config.ctx_len
    if not 1 <= len(tokens) <= ctx_len:
        raise UserError(f"the prompt has {len(tokens)} characters: it must have 1 to {ctx_len}")

    # In MultiHeadAttention, the attention weights pass through attn_dropout, which does nothing in
    # eval mode. A recorder in its place keeps them.
    for block in model.blocks:
        block.mha.attn_dropout = Recorder()
    logits = model(mx.array([tokens]))[0]  # (T, vocab_size)

    print_row("", one_line(prompt))
    draw_surprise(logits, tokens)
    for i, block in enumerate(model.blocks):
        weights = block.mha.attn_dropout.recorded[0]  # (n_heads, T, T)
        for head in range(model.config.n_heads):
            from_last = weights[head, -1].tolist()  # what the last position attends to
            print_row(f"block {i}, head {head}", bars(from_last))
    draw_next(logits[-1], tokenizer)


def print_row(title, text):
    """Prints a row of the picture: the title takes 18 columns."""
    print(f"{title:18}{text}")


def draw_surprise(logits, tokens):
    """Draws the loss at each token except the first. A full bar is that of uniform guessing."""
    if len(tokens) > 1:
        targets = mx.array(tokens[1:])  # (T - 1,)
        losses = nn.losses.cross_entropy(logits[:-1], targets)  # (T - 1,): one for each target
        uniform = math.log(logits.shape[-1])
        print_row("surprise", " " + bars((losses / uniform).tolist()))


def draw_next(logits, tokenizer):
    """Draws the probabilities of the 8 most likely next characters. logits is (vocab_size,)."""
    probabilities = mx.softmax(logits)  # (vocab_size,)
    for token in mx.argsort(-probabilities)[:8].tolist():
        p = probabilities[token].item()
        print_row(f"next {tokenizer.vocab[token]!r}", f"{p:.2f} {'█' * round(50 * p)}")


# %% 13. The run
#
# The loop is in train(), at the end of this section. First, its helpers.


def load_data():
    """Reads input.txt. Returns a tokenizer, the training and validation tokens, and a checksum.

    Both parts are NumPy arrays. The checksum is a number that tells one text from another. Raises
    OSError, or UserError if there is too little to learn from.
    """
    try:
        text = load_text()
    except FileNotFoundError:
        raise UserError(f"there is no input.txt in {os.getcwd()}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"input.txt is not UTF-8: {error}") from None
    if "\0" in text:  # as in UTF-16, another encoding
        raise UserError("input.txt has NUL characters in it: save it as UTF-8")
    tokenizer = CharTokenizer(text)
    if len(tokenizer.vocab) < 2:
        raise UserError("input.txt must have at least two different characters")
    train_tokens, val_tokens = split(np.array(tokenizer.encode(text), dtype=np.int32))
    if count_batches(train_tokens, ctx_len, batch_size) < 1 or len(val_tokens) <= ctx_len:
        raise UserError(f"input.txt, of {len(text):,} characters, is too short for batches of "
                        f"{batch_size} rows of {ctx_len}")
    return tokenizer, train_tokens, val_tokens, zlib.crc32(text.encode())


# The next two functions only save time on machines without a GPU. In MLX, a *stream* is a queue of
# operations: those written inside `with mx.stream(s)` go to s. Each stream has a thread of its own,
# which works through it in order, and the computer runs two threads at once, on two cores.
FIRST_STREAM = mx.new_thread_local_stream(mx.cpu)
SECOND_STREAM = mx.new_thread_local_stream(mx.cpu)


def two_core_loss(model, x, y):
    """The same as loss_fn, but each of two cores takes half of the rows.

    Because MLX is lazy, the two calls of loss_fn only build the graph. When the loss is needed,
    both cores compute. Backpropagation runs each operation in the stream of its forward operation,
    so it is divided, too. The sum needs both halves, so the second stream waits for the first.
    """
    half = len(x) // 2
    if 2 * half != len(x):  # the average of two unequal halves is not the mean of all rows
        return loss_fn(model, x, y)
    with mx.stream(FIRST_STREAM):
        first = loss_fn(model, x[:half], y[:half])
    with mx.stream(SECOND_STREAM):
        second = loss_fn(model, x[half:], y[half:])
        return (first + second) / 2


def choose_loss_fn():
    """loss_fn, or two_core_loss where there is no GPU."""
    if mx.default_device() != mx.cpu:
        return loss_fn
    # Only a matter of speed; you can delete this line. The number influences the order in which MLX
    # queues operations. In trials, 8 kept both cores busier than MLX's own 20. It must be set
    # before MLX first computes, so train() calls this function first.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "8")
    return two_core_loss


# Several computers, or several *processes* (running programs) on one, can train a model together.
# Each computes the gradients for its share of the rows of each batch, and nn.average_gradients, in
# make_step, gives all of them the mean. They start with the same weights, thanks to `seed`, and
# take the same steps, so their models stay the same. This is called *data parallelism*. mlx.launch
# starts them and numbers them from 0: this number is the *rank*.


def join_processes(settings, checksum, history):
    """The rank of this process, and how many processes there are: without mlx.launch, 0 and 1.

    history has the losses of the epochs so far, if a run is resumed. Raises UserError if the
    processes differ in settings, text, or history, or cannot share a batch evenly.
    """
    world = mx.distributed.init()  # the group of all processes
    # To compare their plans, it is enough for each process to send a checksum of its own to all.
    plan = json.dumps([settings, checksum, history])
    ours = mx.array([zlib.crc32(plan.encode())], dtype=mx.uint32)  # (1,)
    all_checksums = mx.distributed.all_gather(ours)  # (processes,)
    if mx.any(all_checksums != ours):
        raise UserError(f"the processes differ in their settings, input.txt, or {CHECKPOINT}")
    if batch_size % world.size() != 0:
        raise UserError(f"{world.size()} processes cannot share batch_size = {batch_size} rows")
    return world.rank(), world.size()


def print_passing(line):
    """In a terminal, prints a line that the next print() overwrites."""
    if sys.stdout.isatty():  # not in a pipe or a file
        width = shutil.get_terminal_size().columns - 1
        line = line[:width].ljust(width)  # neither longer nor shorter than the terminal is wide
        print(line, end="\r", flush=True)  # \r: back to the beginning of the line


def check_finite(loss, step):
    """Raises UserError if the training has diverged: the loss, a float, is nan or inf."""
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at step {step}: lower lr")


class Progress:
    """Counts the steps, and prints from time to time how far training has come."""

    def __init__(self, steps_done, total_steps):
        self.step = steps_done
        self.total_steps = total_steps
        self.start_step = None  # the clock starts after the first step, which compiles
        self.start_time = None
        self.last_print = None

    def update(self, loss):
        """Counts a step, whose loss is a scalar array."""
        self.step += 1
        if self.start_step is None:
            mx.eval(loss)  # wait until the first step is done
            self.start_step = self.step
            self.start_time = time.perf_counter()
            self.last_print = self.start_time
            return

        if self.step % 200 == 0:
            check_finite(loss.item(), self.step)  # not in every step: .item() waits for the GPU
        now = time.perf_counter()
        pause = 1 if sys.stdout.isatty() else 15  # seconds between two lines
        if now - self.last_print > pause:
            self.last_print = now
            self.print_line(loss.item(), now)

    def print_line(self, loss, now):
        """Prints the loss, and how long the rest will take."""
        seconds_per_step = (now - self.start_time) / (self.step - self.start_step)
        minutes_left = seconds_per_step * (self.total_steps - self.step) / 60
        line = (f"step {self.step:,} of {self.total_steps:,}, loss {loss:.2f}, "
                f"{minutes_left:.1f} min left")
        if sys.stdout.isatty():
            print_passing(line)
        else:
            print(line, flush=True)


def introduce(model, tokenizer, settings):
    """Prints what will be trained, with which settings, so that you notice a wrong one."""
    values = [f"{name}={value}" for name, value in settings.items()]
    V = len(tokenizer.vocab)
    print(f"The {'small' if small else 'default'} model: {count_parameters(model):,} parameters")
    print(textwrap.fill(", ".join(values), width=79))
    print(f"Uniform guessing among {V} characters: loss = ln {V} = {math.log(V):.4f}")


def report(title, train_loss, val_loss, model, tokenizer):
    """Prints the losses, and a line of text that the model generates now."""
    perplexity = math.exp(min(val_loss, 99))  # exp(1000) would overflow
    print(f"{title} | train = {train_loss:.4f} | val = {val_loss:.4f} | "
          f"perplexity {perplexity:.1f}")
    prompt = first_char(tokenizer)  # any text will do, if its characters are in input.txt
    text = "".join(continue_text(model, tokenizer, prompt, 69 - len(prompt)))
    print(f"{'':10}{one_line(prompt + text)}", flush=True)  # 10 + 69 columns


def best_loss(history):
    """The lowest validation loss of a run."""
    return min(epoch["val"] for epoch in history)


def keep_former_model():
    """Before a new run saves, copies the old model to FORMER and deletes the old checkpoint.

    The model is copied and not moved, so that MODEL exists at all times.
    """
    if os.path.exists(MODEL):
        shutil.copyfile(MODEL, unfinished(FORMER))
        os.replace(unfinished(FORMER), FORMER)
    Path(CHECKPOINT).unlink(missing_ok=True)


def save_epoch(model, optimizer, tokenizer, settings, checksum, history):
    """Saves the model, if it is the best so far, and then the checkpoint.

    The checkpoint comes last. If the run is killed before that, the previous epoch's checkpoint is
    still there, and --resume repeats this epoch. (In the first epoch there is none: start over.)
    """
    if len(history) == 1:  # the first epoch of a new run
        keep_former_model()
    if history[-1]["val"] == best_loss(history):
        save_model(MODEL, model, tokenizer)
    state = {"model": model.parameters(), "optimizer": optimizer.state}
    save(CHECKPOINT, state, {"settings": settings, "checksum": checksum, "history": history})


MAY_CHANGE = ["num_epochs", "max_new_tokens", "temperature", "top_k"]  # before a --resume


def check_same_run(notes, settings, checksum):
    """Raises UserError unless the run with these notes can go on with these settings."""
    if "history" not in notes:
        raise UserError(f"{CHECKPOINT} holds no checkpoint: start a new run")
    if notes["checksum"] != checksum:
        raise UserError(f"{CHECKPOINT} is from a run on a different input.txt: put that text "
                        f"back, or start a new run")
    must_agree = {name: settings[name] for name in settings if name not in MAY_CHANGE}
    different = changes(notes["settings"], must_agree)
    if different:
        raise UserError(f"settings have changed since {CHECKPOINT}: {different}. Change them back, "
                        f"or start a new run")
    if len(notes["history"]) >= num_epochs:
        raise UserError("that run is finished: raise num_epochs to keep training")
    if not os.path.exists(MODEL):
        raise UserError(f"{MODEL}, with the best weights so far, is gone: start a new run")


def resume_run(model, optimizer, settings, checksum):
    """Restores model and optimizer from CHECKPOINT. Returns the history of that run.

    Raises UserError if the checkpoint is not from this run.
    """
    saved, notes = load(CHECKPOINT)
    check_same_run(notes, settings, checksum)
    ours = {"model": model.parameters(), "optimizer": optimizer.state}
    check_match(CHECKPOINT, saved, ours)
    model.update(saved["model"])
    optimizer.state = saved["optimizer"]  # a new dict. Call make_step after this, to pick it up
    history = notes["history"]
    print(f"Resuming after epoch {len(history) - 1}, val = {history[-1]['val']:.4f}")
    old_epochs = notes["settings"]["num_epochs"]
    if old_epochs != num_epochs:
        print(f"num_epochs was {old_epochs}: from now on, the learning rate follows the schedule "
              f"for {num_epochs}")
    return history


def read_run_log():
    """The lines of the run log."""
    if not os.path.exists(RUN_LOG):
        return []
    return Path(RUN_LOG).read_text(encoding="utf-8", errors="replace").splitlines()


def compare_with_last(run, earlier_lines):
    """What changed since the last run on the same text, and how the best loss changed, in words."""
    last = None
    for line in earlier_lines:
        try:
            old = json.loads(line)
        except ValueError:  # a damaged line
            continue
        if isinstance(old, dict) and old.get("checksum") == run["checksum"]:
            last = old
    if last is None:
        return "This is the first run on this text."
    changed = changes(last["settings"], run["settings"])
    if not changed:
        changed = "no settings (code edits are not compared)"
    return (f"Changed since the last run: {changed}. "
            f"Best validation loss {last['best_val']:.4f} to {run['best_val']:.4f}")


def finish(history, settings, checksum):
    """Logs a run, generates text with the best weights, and compares the run with the last one."""
    model, tokenizer = load_model()
    run = {
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        "checksum": checksum,
        "parameters": count_parameters(model),
        "minutes": round(sum(epoch["minutes"] for epoch in history), 1),
        "best_val": best_loss(history),
        "settings": settings,
    }
    earlier_lines = read_run_log()
    all_lines = [*earlier_lines, json.dumps(run)]
    save_text(RUN_LOG, "\n".join(all_lines) + "\n")

    text = "".join(continue_text(model, tokenizer, first_char(tokenizer), max_new_tokens))
    save_text(COMPLETIONS, text)
    print(f"\n{text}\n")
    print(f"The best weights are in {MODEL}, this text is in {COMPLETIONS}, and {RUN_LOG} has an "
          f"entry about this run.")
    print(compare_with_last(run, earlier_lines))


def train(resume=False):
    """Trains a model on input.txt, saves it after each epoch, and generates text at the end.

    With resume=True, it goes on after the last saved epoch. Raises UserError.
    """
    if not os.access(".", os.W_OK):
        raise UserError(f"the folder {os.getcwd()} cannot be written to")
    fast_loss_fn = choose_loss_fn()
    settings = check_settings()
    tokenizer, train_tokens, val_tokens, checksum = load_data()
    steps_per_epoch = count_batches(train_tokens, ctx_len, batch_size)
    total_steps = num_epochs * steps_per_epoch

    mx.random.seed(seed)
    model = GPT(GPTConfig(len(tokenizer.vocab), ctx_len, n_emb, n_heads, n_layers, dropout))
    optimizer = make_optimizer(total_steps)
    optimizer.init(model.trainable_parameters())  # creates m and v, which resume_run may replace
    history = []  # for each epoch, its losses and how many minutes it took
    if resume:
        history = resume_run(model, optimizer, settings, checksum)
    rank, processes = join_processes(settings, checksum, history)

    introduce(model, tokenizer, settings)
    if not resume:
        train_loss = evaluate(model, train_tokens[: 100 * ctx_len], fast_loss_fn)
        val_loss = evaluate(model, val_tokens[: 100 * ctx_len], fast_loss_fn)
        report("Untrained", train_loss, val_loss, model, tokenizer)
    print_passing("Compiling the training step")

    step = make_step(model, optimizer, fast_loss_fn)
    progress = Progress(len(history) * steps_per_epoch, total_steps)
    for epoch in range(len(history), num_epochs):
        started = time.perf_counter()
        rng = np.random.default_rng([seed, epoch])  # so that a resumed epoch is the same
        mx.random.seed(int(rng.integers(2**31)) + rank)  # for dropout, different in each process
        model.train()
        for x, y in get_batches(train_tokens, ctx_len, batch_size, rng):
            # This process's share: every `processes`-th row from `rank` on. Alone, it gets all.
            x = x[rank::processes]
            y = y[rank::processes]
            loss = step(x, y)
            # Start to compute, and meanwhile prepare the next batch. (mx.eval would wait.)
            mx.async_eval(loss, model.state, optimizer.state)
            progress.update(loss)
            # Put here whatever you want to do every so many steps, for example:
            #     if progress.step % 10 == 0:
            #         print(f"\nstep {progress.step}: loss {loss.item()}")
            #     if progress.step % 500 == 0:  # --resume still goes back to the last whole epoch
            #         save_model(f"step{progress.step}.safetensors", model, tokenizer)
            # load_model("step500.safetensors") reads such a file, and continue_text() makes text.

        print_passing("Measuring the losses")
        train_loss = evaluate(model, train_tokens[: 1000 * ctx_len], fast_loss_fn)  # a part of it
        val_loss = evaluate(model, val_tokens, fast_loss_fn)
        check_finite(val_loss, progress.step)
        minutes = (time.perf_counter() - started) / 60
        history.append({"train": train_loss, "val": val_loss, "minutes": minutes})
        if rank == 0:  # with several computers, copy these files to the others before a --resume
            save_epoch(model, optimizer, tokenizer, settings, checksum, history)
        report(f"Epoch {epoch:2}", train_loss, val_loss, model, tokenizer)

    if rank == 0:
        finish(history, settings, checksum)


# %% 14. The command line


def main():
    """Does what the command line says. Shows a UserError or OSError on one line."""
    parser = argparse.ArgumentParser(description="Without options: train GPT-2 on input.txt.")
    options = parser.add_mutually_exclusive_group()
    # nargs="?": TEXT may be left out, and is then const.
    options.add_argument("--sample", metavar="TEXT", nargs="?", const="",
                         help="continue TEXT with the trained model")
    options.add_argument("--look", metavar="TEXT",
                         help="show what the trained model attends to and what it predicts next")
    options.add_argument("--resume", action="store_true", help="resume an interrupted run")
    arguments = parser.parse_args()

    sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    if mx.distributed.init().rank() > 0:  # of several processes, only the first prints
        sys.stdout = io.StringIO()  # keeps what the others print, and nobody reads it
    try:
        if arguments.sample is not None:  # "" is a valid TEXT
            type_out(arguments.sample)
        elif arguments.look is not None:
            look(arguments.look)
        else:
            train(arguments.resume)
        sys.stdout.flush()  # writes what is left, and may raise BrokenPipeError
    except KeyboardInterrupt:  # Ctrl-C
        sys.exit("\ntrain.py: stopped. To resume an unfinished run: python train.py --resume")
    except BrokenPipeError:  # no one reads what we print, as after: python train.py --sample | head
        sys.stdout = None  # at exit Python flushes stdout, which would fail again
        sys.exit(1)
    except (UserError, OSError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    if Path(sys.argv[0]).name.endswith("kernel_launcher.py"):
        train()  # in a notebook, where sys.argv belongs to the program that runs the cells
    else:
        main()
