"""GPT-2 from scratch in MLX: a tutorial in one file.

    python train.py                     train on input.txt, then write some text
    python train.py --sample "To be"    let the trained model continue a text
    python train.py --look "To be"      see what it looks at, and what it expects next
    python train.py --resume            go on with a run that was stopped

Read it from the top: each section needs only what stands above it.

     1. Settings     5. Loss and learning     9. Training
     2. Data         6. Attention            10. Sampling
     3. Tokenizer    7. MLP and block        11. Conveniences, which a first reading may skip
     4. Batches      8. GPT                  12. The run

Then change something and run it again.

GPT-2 is a network that reads a text and says what may come next, here which character. We measure
it by its loss on text that it has never seen, and lower is better. Guessing blindly costs 4.17.
The default model reaches 1.25 on the shipped input.txt, and the small one, which is trained where
there is no GPU, 1.55.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26.4", "mlx>=0.32.4", "mlx[cpu]>=0.32.4; sys_platform == 'linux'",
#                 "mlx-cpu>=0.32.4; sys_platform == 'win32'"]
# ///

import copy
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

# ---------------------------------------------------------------------------------------------
# 1. Settings
#
# Skip them on a first reading: each is explained where it is used. Where there are two values,
# the first is for the small model.

small = mx.default_device() == mx.cpu  # without a GPU the default model would take hours

# The model.
ctx_len = 48 if small else 128     # how many characters it sees at once
n_emb = 56 if small else 128       # how many numbers stand for one character inside it
n_heads = 7 if small else 4        # attention heads in a block; n_emb must be a multiple of it
n_layers = 1 if small else 3       # blocks, one after the other
dropout = 0.0 if small else 0.03   # share of values zeroed at random; more if it learns by heart

# Its training.
num_epochs = 3 if small else 20    # passes over the text
batch_size = 8 if small else 32    # rows of text in a step; fewer makes more, but noisier, steps
lr = 1e-2 if small else 3e-3       # learning rate; lower it if the loss jumps about or becomes nan
warmup_steps = 100                 # steps in which the learning rate rises from almost 0
weight_decay = 0.1                 # pull of the weights towards 0; more makes simpler models
beta1 = 0.9                        # memory of AdamW for gradients; 1 would be for ever
beta2 = 0.99                       # and its memory for their squares
max_norm = 1.0                     # a gradient longer than this is shortened to it
seed = 0                           # another number, another run

# The text it writes.
max_new_tokens = 1000              # how many characters
temperature = 0.8                  # 0: always the likeliest; 1: as the model believes; more: wilder
top_k = 40                         # only among this many likeliest characters

# ---------------------------------------------------------------------------------------------
# 2. Data
#
# One text file is all the data there is. The model is trained on the first nine tenths of it. The
# last tenth is for validation: on text that it has never seen the model shows whether it has
# learnt the language, or only learnt the text by heart.


def load_text(path="input.txt"):
    """The text of a UTF-8 file, its line ends turned into newlines.

    Raises OSError if it cannot be read, UnicodeDecodeError if it is not UTF-8.
    """
    return Path(path).read_text(encoding="utf-8-sig")  # -sig: without the mark some editors add


def split(text):
    """The first nine tenths of a text, to train on, and the last tenth, to validate with."""
    boundary = len(text) * 9 // 10
    return text[:boundary], text[boundary:]


# ---------------------------------------------------------------------------------------------
# 3. Tokenizer
#
# A network computes with numbers, so every character gets one: its place in the sorted list of
# all different characters of the text, the vocabulary. Such a number is called a token. The
# shipped text has 65 different characters, and
#
#     encode("hello world") == [46, 43, 50, 50, 53, 1, 61, 53, 56, 50, 42]
#
# GPT-2 itself has 50,257 tokens, most of them pieces of words. With single characters the text
# has more tokens, but how they are made needs no more explanation.


class CharTokenizer:
    """Translates between text and tokens; the vocabulary is the set of characters of `text`."""

    def __init__(self, text):
        self.vocab = sorted(set(text))
        self.vocab_size = len(self.vocab)
        self._token_of = {char: token for token, char in enumerate(self.vocab)}

    def encode(self, text):
        """A string to a list of ints. Raises KeyError at a character outside the vocabulary."""
        return [self._token_of[char] for char in text]

    def decode(self, tokens):
        """Tokens, any iterable of ints, to a string."""
        return "".join(self.vocab[token] for token in tokens)


# ---------------------------------------------------------------------------------------------
# 4. Batches
#
# The model is to learn one thing: given the characters so far, which one is next? So the answers,
# the labels, are the text itself, shifted by one. The shipped text begins with "First Citizen:",
# and its first nine tokens are 18 47 56 57 58 1 15 47 58. In rows of T = 8 tokens that makes
#
#     x = 18 47 56 57 58  1 15 47        F i r s t _ C i
#     y = 47 56 57 58  1 15 47 58        i r s t _ C i t
#
# One row holds T examples: after "F" comes "i", after "Fi" comes "r", and so on to "First Ci",
# after which comes "t". The model answers all T at once, one at each place of the row, called a
# position. Section 6 sees to it that no position can look at its own answer.
#
# A batch is B rows that know nothing of each other, stacked in one array (B, T).
#
# An epoch is one pass over the training text, in rows of T = ctx_len tokens. Were the text always
# cut at the same places, the model would read a token at the start of a row only ever without what
# stands before it. So each epoch begins to cut at another, random place. The rows come in random
# order.
#
# The text is cut with NumPy, np. The model will compute with MLX, mx, a library of much the same
# arrays, which can use a GPU and find gradients.


def count_batches(tokens, batch_size):
    """The number of full batches in a training epoch. The random start costs one row."""
    return (len(tokens) // ctx_len - 1) // batch_size


def get_batches(tokens, batch_size, shuffle):
    """Yields (x, y), integer arrays (B, T), where y holds the token that follows each of x.

    tokens is a NumPy array of integers. With shuffle=True, for training, rows are cut and ordered
    at random, no token is a label twice, and what does not fill a batch is left out. With
    shuffle=False, for validation, all rows come in order, with fewer than batch_size in the last
    batch, and only the last tokens, too few for a row, are left out.
    """
    if shuffle:
        starts = np.random.permutation(len(tokens) // ctx_len - 1) * ctx_len
        starts = starts[: count_batches(tokens, batch_size) * batch_size]
        starts = starts + np.random.randint(ctx_len)
    else:
        starts = np.arange((len(tokens) - 1) // ctx_len) * ctx_len
    for i in range(0, len(starts), batch_size):
        # With None the starts are a column, (B, 1). The offsets are a row, (T + 1,). Added, each is
        # repeated to (B, T + 1): [[0], [10]] + [0, 1, 2, 3] is [[0, 1, 2, 3], [10, 11, 12, 13]].
        # These are places in the text, here of two rows of three tokens, each with the label of
        # the last one behind it. And an array of places fetches an array of tokens.
        rows = tokens[starts[i : i + batch_size, None] + np.arange(ctx_len + 1)]  # (B, T + 1)
        yield mx.array(rows[:, :-1]), mx.array(rows[:, 1:])  # (B, T) each


# ---------------------------------------------------------------------------------------------
# 5. Loss and learning
#
# Before we build a model, let us say what we want of it. At each position it gives a score to
# each of the V tokens of the vocabulary: the logits. The function softmax turns scores s into
# probabilities, which are positive and sum to 1: p_i = exp(s_i) / (exp(s_1) + ... + exp(s_V)).
# The scores 2, 1, 0, for example, become 0.67, 0.24, 0.09.
#
# The loss says how wrong the model was. All that counts is the probability p that it gave to the
# character that really came, and the price for it is -ln p:
#
#     p        1       0.22     1/65      0.001
#     loss     0       1.5      4.17      6.9
#
# The mean over all positions is called cross-entropy. (Its unit is the nat, as the logarithm is
# the natural one.) Blind guessing gives each of 65 characters p = 1/65, so it costs ln 65 = 4.17.
# With a loss of 1.5 one is as unsure as between exp(1.5) = 4.5 equally likely characters.
#
# How low can it go? Much can be had by counting. Whoever knows how often each character occurs in
# the training text pays 3.24 on the last tenth of the shipped text. Counting pairs of characters,
# the one to guess and the one before it, brings that to 2.36, three together to 1.83, four to 1.51,
# and seven to 1.33. (Where seven were seen seldom or never, their last six are asked, and so on.
# The usual way to mix them, by which these figures were made, is called modified Kneser-Ney.) There
# it stops, and eight do no better: more than a third of that tenth's pieces of eight characters
# never occur in the training text. The small model comes to 1.55, the default one to 1.25.


def loss_fn(model, x, y):
    """Mean cross-entropy in nats per character (a scalar array) of labels y, given x: (B, T)."""
    return nn.losses.cross_entropy(model(x), y, reduction="mean")  # softmax, -ln and mean in one


# Learning means to lower the loss by turning the parameters, the numbers inside a model. Take a
# tiny model with one parameter w, for a language of only two letters. It gives "a" the logit w and
# "b" the logit 0, so the probability of "a" is p = exp(w) / (exp(w) + 1), as exp(0) = 1. Three
# letters of four in the training text are an "a", so the loss is -(3/4) ln p - (1/4) ln(1 - p).
#
# Which way should w be turned? At w = 0 the loss is 0.6931. Nudge w by 0.001, and the loss falls
# by 0.00025. Their ratio, -0.25, is the gradient: how fast the loss grows when w grows. Here it is
# negative, so a larger w is better. Now take a step against the gradient, w = w - 2 * gradient,
# and again, and again. (For this loss there is a formula for the gradient: p - 3/4.)
#
#     w           0        0.5      0.755    0.895    ...   1.099 = ln 3
#     p           0.5      0.622    0.680    0.710    ...   0.75
#     loss        0.6931   0.5991   0.5740   0.5664   ...   0.5623
#     gradient   -0.25    -0.128   -0.070   -0.040    ...   0
#
# It ends where p is the true share, 3/4. The 2 is the learning rate. With 20 in its place the
# first step leads to w = 5, far beyond the goal, and the loss there is 1.26, worse than before.
#
# A real model has many parameters, and a nudge for each would take for ever. But it is a chain of
# functions, one working on the result of the other, and in a chain gradients, or slopes, multiply.
# Say z grows 3 times as fast as w, and the loss falls 2 times as fast as z grows. Then the loss
# falls 6 times as fast as w grows: its gradient for w is -2 * 3 = -6. Starting at the loss, MLX
# goes backwards through the model, multiplying all the way. What it has found for z serves all
# that z is made of. Where a number is used in several places, what comes back is added: w has the
# slope 5 in 3 * w + 2 * w. So one way back gives the gradients of all parameters.
#
# The gradient of a batch is the mean of the gradients of its examples. What would help with only
# one of them mostly cancels out, and what would help with many remains.

# ---------------------------------------------------------------------------------------------
# 6. Attention
#
# Inside the model, each character of a row is a vector, that is a list of n_emb numbers which
# describe it. They are learnt; for now take them as given. To guess what comes next, a position
# has to take in what stands before it. How can a vector hold a summary of others?
#
# The simplest way is the average of all vectors up to its own. For three positions these weights
# give that, a row for each position that looks, a column for each that it looks at:
#
#     1    0    0
#     1/2  1/2  0
#     1/3  1/3  1/3
#
# So the third takes a third of the first vector, of the second and of its own. The zeros are a
# must. What stands to the right is the very answer that is asked for, and a model that may look at
# it learns to copy instead of to predict.
#
# The same weights can be made by softmax. Equal scores get equal weights, and a score of -inf gets
# none, since exp(-inf) = 0. (A score of 0 would not do. It is a score like any other.)
#
#     softmax(0, -inf, -inf) = 1    0    0
#     softmax(0,    0, -inf) = 1/2  1/2  0
#     softmax(0,    0,    0) = 1/3  1/3  1/3
#
# So averaging the past is softmax(scores + mask), where all scores are 0 and the mask holds -inf
# to the right of the diagonal. Attention is this, with scores that depend on what stands there.
# From its vector each position makes three shorter ones, by three matrices that are learnt:
#
#     the query   what I am looking for
#     the key     how others can find me
#     the value   what I tell those who look at me
#
# The score that a position gives to another is the dot product of its own query and the other's
# key: number times number, summed, so that (1, 2) and (3, 4) give 1 * 3 + 2 * 4 = 11. It is large
# where the two point the same way. Query and key differ because what one looks for is not what one
# is. The last letter of "the cat" may look for the space before its word, while its own key tells
# others that it is a t. With one vector for both, a t would tend to find other ts.
#
# The matrix product a @ b holds all dot products of a row of a with a column of b. So one @ makes
# all scores. And x @ W, with vectors as the rows of x and a learnt matrix W, holds other vectors:
# that is how q, k and v are made. Here is one such attention, called a head, with head_size = 2
# numbers in each query, key and value. (The root in it is explained right after.) To try it in
# python, copy it without the # and the spaces before each line:
#
#     import numpy as np
#     q = np.array([[1, 0], [3, 0], [0, 3]])    # a row for each of 3 positions: (T, head_size)
#     k = np.array([[1, 0], [0, 1], [1, 1]])
#     v = np.array([[10, 0], [0, 10], [5, 5]])
#     scores = q @ k.T / np.sqrt(2)             # (T, T); in k.T the keys are columns
#     position = np.arange(3)
#     later = position[:, None] < position      # (T, T)
#     scores = np.where(later, -np.inf, scores)
#     weights = np.exp(scores)
#     weights = weights / weights.sum(axis=1, keepdims=True)
#     out = weights @ v                         # (T, head_size)
#
#     scores                   weights               out
#     0.71  -inf  -inf         1.00  0.00  0.00      10.0   0.0
#     2.12  0.00  -inf         0.89  0.11  0.00       8.9   1.1
#     0.00  2.12  2.12         0.06  0.47  0.47       2.9   7.1
#
# The second query, (3, 0), fits the first key, (1, 0), so the second position takes home mostly
# the first value. The third finds the second key and its own equally good: 0.06 of (10, 0), 0.47
# of (0, 10) and 0.47 of (5, 5) make about (2.9, 7.1). Such sums are what the last @ does. The line
# with `later` compares a column of positions, (T, 1), with a row of them, (T,): each is repeated
# to (T, T), and every position is compared with every other, without a loop.
#
# Why divide by the square root of head_size? The larger head_size, the more products are summed in
# a score. The variance of numbers with mean 0 is the mean of their squares; its root says how large
# they typically are. If numbers are independent, so that none tells anything about another, the
# variance of their sum is the sum of their variances. Say the numbers in queries and keys are
# independent, with mean 0 and variance 1. Then each product has mean 0 and variance 1 * 1, a sum of
# 32 products has variance 32, and a typical score is as large as sqrt(32) = 5.7. But softmax(5.7,
# 0) = (0.997, 0.003) looks at one position only. Divided, it is softmax(1, 0) = (0.73, 0.27), which
# leaves something to choose. That is the general argument. A new model of ours has far smaller
# scores, as its parameters start small, and in a short run you may find no difference.
#
# Why several heads? One head makes one average, so it looks for one kind of thing. n_heads of them
# look for several kinds, each with its own queries, keys and values of head_size = n_emb / n_heads
# numbers, so that all together have as many parameters as one large head. What they find is put
# side by side. With a function head(x) for each, which makes q, k and v of x by matrices of its own
# and goes on as above, this is
#
#     out = np.concatenate([head(x) for head in heads], axis=-1)    # (T, n_emb)
#
# It can be done without the loop. One matrix makes the queries of all heads at once, n_emb numbers
# for each position, which are then cut into heads. Say we have four positions with two numbers
# each, and two heads, which get one number each:
#
#     x = np.arange(8).reshape(4, 2)            # position 0 has 0 1, then come 2 3, 4 5 and 6 7
#     x.reshape(4, 2, 1).transpose(1, 0, 2)     # head 0 has 0 2 4 6, head 1 has 1 3 5 7: right
#     x.reshape(2, 4, 1)                        # head 0 has 0 1 2 3, head 1 has 4 5 6 7: wrong
#
# In the wrong way a head would have half of the positions, and not its part of each position.
#
# The product @ works on the last two axes and repeats that for all axes before them. So which axes
# stand last decides what is compared with what:
#
#     (B, n_heads, T, head_size)     scores (B, n_heads, T, T)
#     (B, T, n_heads, head_size)     scores (B, T, n_heads, n_heads)
#
# In the first, each position is compared with each position, for every row and head by itself. That
# is what we want. In the second, which we have without the transpose, each head is compared with
# each head, for every row and position by itself. At the end transpose and reshape put the heads
# side by side again, and a last matrix, c_proj, mixes what they have found.
#
# (Vaswani et al., Attention Is All You Need, 2017)


def causal_mask(T, S):
    """(T, S), for the last T of S positions: -inf where the one looked at stands later, else 0.

    In training T = S, as above.
    """
    return mx.where(mx.arange(S - T, S)[:, None] < mx.arange(S), -mx.inf, 0.0)


# In MLX a part of a model is a class made from nn.Module, which finds the parameters in all its
# attributes; calling the object runs __call__. nn.Linear(a, b) turns vectors of a numbers into
# vectors of b numbers. It holds a matrix and, unless bias=False, b numbers to add, called bias.


class MultiHeadAttention(nn.Module):
    """Attention among the positions of each row, none of which looks ahead ("causal").

    (B, T, n_emb) to (B, T, n_emb). n_emb is a multiple of n_heads.
    """

    def __init__(self):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(n_emb, n_emb, bias=False)
        self.k_proj = nn.Linear(n_emb, n_emb, bias=False)
        self.v_proj = nn.Linear(n_emb, n_emb, bias=False)
        self.c_proj = nn.Linear(n_emb, n_emb)
        # Dropout sets a random share of its input to 0, and scales up the rest to make up for it.
        # The model cannot rely on any one value, and learns less by heart. It is for training only:
        # when we measure the model or let it write, we want all of it.
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)

    def qkv(self, x):
        """Queries, keys and values of x, (B, T, n_emb). Each is (B, n_heads, T, head_size)."""
        B, T, _ = x.shape

        def heads(z):
            z = z.reshape(B, T, self.n_heads, -1)  # (B, T, n_heads, head_size)
            return z.transpose(0, 2, 1, 3)  # (B, n_heads, T, head_size)

        return heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))

    def weights(self, q, k):
        """How much each query looks at each key, (B, n_heads, T, S). Each row sums to 1.

        S counts the keys, and the T queries belong to the last T of them. In training T = S. Only
        when it writes, in section 10, are there keys of earlier positions as well.
        """
        T, S = q.shape[2], k.shape[2]
        # The keys' last two axes are swapped, as k.T did above.
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[3])  # (B, n_heads, T, S)
        return mx.softmax(scores + causal_mask(T, S), axis=-1)

    def __call__(self, x):
        q, k, v = self.qkv(x)  # (B, n_heads, T, head_size) each
        out = self.attn_dropout(self.weights(q, k)) @ v  # (B, n_heads, T, head_size)
        out = out.transpose(0, 2, 1, 3).reshape(x.shape)  # (B, T, n_emb), the heads side by side
        return self.resid_dropout(self.c_proj(out))  # (B, T, n_emb), and what they found, mixed


# ---------------------------------------------------------------------------------------------
# 7. MLP and block
#
# Attention moves information between positions. The MLP ("multi-layer perceptron") then works on
# what has arrived, at each position by itself. It is two matrices with a function between them.
# Without the function they could do no more than one matrix, as (x @ M) @ N = x @ (M @ N), and a
# matrix can only weigh and add. In GPT-2 the function is GELU: x times the probability that a
# number drawn from the standard normal distribution is below x.
#
#     x           -3       -1       0        1        3
#     gelu(x)     -0.004   -0.159   0        0.841    2.996
#
# So it is nearly 0 on the left, nearly x on the right, and smooth between. The first matrix makes
# 4 * n_emb numbers out of n_emb, the answers to many small questions about the vector, and the
# second one adds up from them what is to be changed. The 4 is a custom that works well.
# (Hendrycks and Gimpel, Gaussian Error Linear Units, 2016)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, (B, T, n_emb) to (B, T, n_emb)."""

    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(n_emb, 4 * n_emb)
        self.c_proj = nn.Linear(4 * n_emb, n_emb)
        self.dropout = nn.Dropout(dropout)

    def __call__(self, x):
        x = nn.gelu(self.c_fc(x))  # (B, T, 4 * n_emb)
        return self.dropout(self.c_proj(x))  # (B, T, n_emb)


# A block is one attention layer and one MLP. x itself runs straight through:
#
#     x ---+----------------------(+)---+----------------(+)---> x
#          |                       |    |                 |
#          +--> ln_1 --> attention +    +--> ln_2 --> MLP +
#
# What attention and MLP compute is added to x and does not replace it. So a layer has to learn
# only what to change. This is called a residual connection. It also lets the gradient reach the
# first block. In a chain slopes multiply, and after twelve layers with slopes of 1/2 only 1/4096 of
# it would be left. But a sum grows just as fast as the one of its parts that is turned. So on the
# straight path all slopes are 1, and the gradient passes unchanged; what comes through the layers
# is added to it.
# (He et al., Deep Residual Learning for Image Recognition, 2015)
#
# LayerNorm keeps the numbers at a size with which the layers work well. It takes each vector by
# itself, shifts and scales its n_emb numbers to mean 0 and variance 1, then multiplies each by a
# learnt gain and adds a learnt bias. (1, 2, 6), for example, has mean 3, and without it is (-2, -1,
# 3), with variance 14/3; divided by the root of that it is (-0.93, -0.46, 1.39). No other position
# and no other row of the batch plays a part. In a block LayerNorm stands before attention and MLP,
# beside the straight path and not in it, as in GPT-2.
# (Ba et al., Layer Normalization, 2016)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a residual connection."""

    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_emb)
        self.mha = MultiHeadAttention()
        self.ln_2 = nn.LayerNorm(n_emb)
        self.mlp = MLP()

    def __call__(self, x):
        x = x + self.mha(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


# ---------------------------------------------------------------------------------------------
# 8. GPT
#
# How does a character become a vector? A token is only a name: 43 is not more than 18. So the
# model keeps a table, an embedding, with a row of n_emb numbers for every token, and looks the row
# up. The rows start at random and are learnt. Characters that behave alike get similar rows: in
# the trained small model, for most letters the row that points most nearly the same way is that of
# their capital. GPT-2 calls this table wte.
#
# The vector must also say where the character stands. Attention adds up what it finds, and a sum
# has no order. The "a" of "tea" would see what the "a" of "eta" sees, and one attention layer
# could not tell them apart. So there is a second table, wpe, with a row for each position from 0
# to ctx_len - 1, and the two rows are added. This is also why a model cannot see more than ctx_len
# characters: there is no row for the next position.
#
# After the blocks, a last LayerNorm and a last matrix, lm_head, turn each position's vector into
# its vocab_size logits. With the default settings and 65 characters, the parameters are
#
#     wte          65 x 128                                    8,320
#     wpe         128 x 128                                   16,384
#     a block     ln_1 and ln_2                  512
#                 mha: q, k, v            3 x 16,384
#                      c_proj                 16,512
#                 mlp: c_fc                   66,048
#                      c_proj                 65,664
#                                            197,888   x 3   593,664
#     ln_f                                                       256
#     lm_head     128 x 65, and 65 biases                      8,385
#                                                            627,009
#
# So nearly all of them are in the blocks, and two thirds of a block in its MLP. model.parameters()
# holds them in a tree, that is in nested dictionaries and lists. The path to each is its name, for
# example blocks.0.mha.c_proj.weight, and `initial` goes by that.
#
# What is not as in GPT-2: there the queries, keys and values have biases, GELU is computed by an
# approximation with tanh, and lm_head is no matrix of its own, but wte once more, without a bias.
# OpenAI's wpe starts half as large, and the training below is not theirs.
# The smallest GPT-2 has n_emb = 768, 12 heads, 12 layers, ctx_len = 1024 and 50,257 tokens, which
# makes 124 million parameters. The README shows the edit after which this file can load it.
# (Radford et al., Language Models are Unsupervised Multitask Learners, 2019)


def initial(name, weight):
    """The value with which a parameter starts, given its name and an array of its shape.

    Much as in GPT-2, biases are 0 and gains 1. Matrices are random, as equal numbers would get
    equal gradients and stay equal, and small, so that all logits are close to 0 and no character
    is preferred: the first loss must be close to ln vocab_size, or something is wrong.
    """
    if weight.ndim == 1:
        return mx.zeros_like(weight) if name.endswith("bias") else mx.ones_like(weight)
    # std is the root of the variance; 0.02 is GPT-2's. Each block adds two things to x, the outputs
    # of its c_proj layers. A sum of N independent numbers of mean 0 is typically sqrt(N) times as
    # large as one of them. Dividing by that, with N = 2 * n_layers, lets x start at the same size
    # for any number of blocks.
    std = 0.02 / math.sqrt(2 * n_layers) if name.endswith("c_proj.weight") else 0.02
    return mx.random.normal(weight.shape, scale=std)


class GPT(nn.Module):
    """model(tokens) maps (B, T) tokens to (B, T, vocab_size) logits, for any T up to ctx_len."""

    def __init__(self, vocab_size):
        super().__init__()
        self.ctx_len = ctx_len
        self.wte = nn.Embedding(vocab_size, n_emb)
        self.wpe = nn.Embedding(ctx_len, n_emb)
        self.dropout = nn.Dropout(dropout)
        self.blocks = [Block() for _ in range(n_layers)]
        self.ln_f = nn.LayerNorm(n_emb)
        self.lm_head = nn.Linear(n_emb, vocab_size)
        self.update(tree_map_with_path(initial, self.parameters()))

    def __call__(self, tokens, start=0):
        """The logits for tokens at the positions from start on, which is 0 but in section 10.

        Raises ValueError if these positions reach beyond ctx_len.
        """
        end = start + tokens.shape[1]
        if end > self.ctx_len:
            raise ValueError(f"{end} tokens are more than ctx_len = {self.ctx_len}")
        positions = self.wpe(mx.arange(start, end))  # (T, n_emb), the same for all B rows
        x = self.dropout(self.wte(tokens) + positions)  # (B, T, n_emb)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))  # (B, T, vocab_size)


# ---------------------------------------------------------------------------------------------
# 9. Training
#
# A step takes a batch and turns every parameter a little against its gradient. How far? Plain
# steps of lr * gradient, as in section 5, seldom suit all parameters at once: their gradients
# differ in size by orders of magnitude. Adam brings them to one scale. For each parameter it keeps
# a running mean m of its gradient g and a running mean v of the square (no value of attention). In
# each step, with beta1 = 0.9 and beta2 = 0.99,
#
#     m = 0.9 * m + 0.1 * g
#     v = 0.99 * v + 0.01 * g * g
#     w = w - lr * m / sqrt(v)        (m and v start at 0, and bias_correction makes up for that)
#
# While g stays the same, be it 0.001 or 10, the ratio m / sqrt(v) is 1 and w moves by lr. If g goes
# to and fro, between 1 and -1, for example, the ratio is only 0.05. But steps do not become smaller
# as gradients do. Near the goal, where what a batch asks for is mostly chance, they would keep w
# from settling. This is why the learning rate has to fall towards the end.
#
# AdamW adds weight decay: each step also shrinks a parameter by the share lr * weight_decay, so
# that it stays large only if the gradients keep it so. Which ones decay, we say below.
# (Kingma and Ba, Adam, 2014; Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2017)


def make_optimizer(total_steps):
    """AdamW for a training of total_steps steps."""

    def learning_rate(step):
        # It rises in warmup_steps, while m and v still rest on few gradients, and over the whole
        # run it falls towards 0.
        rise, fall = (step + 1) / max(1, warmup_steps), 1 - step / total_steps
        return lr * mx.minimum(1, rise) * mx.maximum(0, fall)

    def decays(name, weight):
        # Only the matrices of linear layers decay: a smaller bias or gain makes no simpler model.
        # Nor do the tables wte and wpe.
        return weight.ndim == 2 and not name.startswith(("wte", "wpe"))

    # partial(f, a) is f with a filled in. What decays goes to the first of two AdamWs, the rest to
    # the second.
    adamw = partial(optim.AdamW, learning_rate, [beta1, beta2], bias_correction=True)
    return optim.MultiOptimizer([adamw(weight_decay=weight_decay), adamw(weight_decay=0)], [decays])


# Three things about MLX.
#
# It is lazy. `a + b` only notes what is to be computed. The work is done when a value is asked
# for, by .item() or print, or when mx.eval demands it. A training loop that never asked would only
# make ever longer notes. mx.async_eval starts the work and does not wait for its end, so that
# Python prepares the next batch meanwhile.
#
# It transforms functions. nn.value_and_grad makes of loss_fn a new function, which returns the
# loss and its gradients, in a tree like that of the parameters.
#
# It compiles. mx.compile runs the Python of a function once (once for each shape of its inputs, of
# which we have one), records the operations, and from then on runs only the recording, with many
# small operations joined into one. Tell it what else the function reads and changes, as inputs and
# outputs: here the parameters (model.state), all that the optimizer keeps (m, v and the number of
# the step), and the state of the random numbers. Everything else is frozen as it was at the first
# call: a print in the function prints once, and dropout, which is on then, stays on. The @ above
# the function hands it to mx.compile and takes what comes back in its place. While you experiment
# with the step, take that line away.


def evaluate(model, tokens, loss_fn=loss_fn):
    """The mean loss over tokens, in nats per character, without dropout."""
    model.eval()  # dropout off
    total = count = 0
    for x, y in get_batches(tokens, batch_size, shuffle=False):
        total += loss_fn(model, x, y).item() * y.size  # the last batch can be smaller
        count += y.size
    return total / count


def train(model, optimizer, train_tokens, val_tokens, first_epoch=0, loss_fn=loss_fn,
          watch=lambda loss: None):
    """Trains model in place; yields (epoch, train loss, validation loss) after each epoch.

    Both losses are measured alike, after the epoch and without dropout; to save time, the training
    loss on a piece half as long as the validation text. loss_fn may be another function with the
    same arguments; watch is called with the loss of each step. (Section 12 will use both. Until
    then, take no notice of them.)
    """
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x, y):
        loss, grads = loss_and_grad(model, x, y)
        grads = nn.average_gradients(grads)  # does nothing, unless several processes train together
        # All gradients together are taken as one long vector. If its length, which is the root of
        # the sum of all squares, is above max_norm, it is shortened to that: m and v would remember
        # one odd batch for a long time.
        grads, _ = optim.clip_grad_norm(grads, max_norm)
        optimizer.update(model, grads)
        return loss

    for epoch in range(first_epoch, num_epochs):
        np.random.seed([seed, epoch])  # so that an epoch is the same, whatever came before
        mx.random.seed(np.random.randint(2**31))
        # evaluate has turned dropout off. A recording keeps it on, but must be made with it on.
        model.train()
        for x, y in get_batches(train_tokens, batch_size, shuffle=True):
            loss = step(x, y)
            mx.async_eval(loss, state)
            watch(loss)
        seen = train_tokens[: len(val_tokens) // 2 + ctx_len]  # a row at least
        yield epoch, evaluate(model, seen, loss_fn), evaluate(model, val_tokens, loss_fn)


# ---------------------------------------------------------------------------------------------
# 10. Sampling
#
# To write, ask the model for the next character, append it, and ask again:
#
#     for _ in range(100):
#         logits = model(mx.array([tokens[-ctx_len:]]))    # (1, T, vocab_size)
#         tokens.append(sample(logits[0, -1]))             # the last position tells what comes next
#
# There must be something to continue. We begin with a newline: in the training text, what follows
# it is the beginning of a line.
#
# Always taking the likeliest character soon leads in circles: once the model sees the same text
# again, all that came after it comes again, too. So we draw one, with the probabilities that the
# model gives. Dividing the logits by a temperature first makes it more careful or bolder:
#
#     logits             2      1      0
#     temperature 0.5    0.87   0.12   0.02
#     temperature 1      0.67   0.24   0.09
#     temperature 2      0.51   0.31   0.19


def sample(logits, temperature=1.0, top_k=None):
    """Draws a token, an int, from logits (vocab_size,). temperature=0 takes the likeliest.

    With top_k, only the k likeliest can be drawn: of the many unlikely ones together, one would
    come now and then, and lead what follows astray.
    """
    if temperature == 0:
        return mx.argmax(logits).item()
    candidates = mx.argsort(-logits)[:top_k]  # (top_k,) tokens, the likeliest first
    choice = mx.random.categorical(logits[candidates] / temperature)  # softmax, then a draw
    return candidates[choice].item()


# The loop above computes everything anew for each character, although, as long as the text fits
# into ctx_len, nearly all is as it was. As the mask lets a position look only at itself and at
# earlier ones, nothing that is appended can change its vectors, in any block, nor its key and
# value. If we keep the keys and values, only the new character has to pass through the model: its
# query meets all the kept keys. This is the key/value cache.
#
# The classes above stay as they are. In a copy of the model, we give each attention layer another
# qkv(). Then weights() gets T new queries and S keys.


def remember(mha):
    """From now on this attention layer keeps its keys and values, and each call sees all kept."""
    only_new, kept = mha.qkv, []

    def qkv(x):
        q, k, v = only_new(x)  # (B, n_heads, T, head_size) each
        if kept:
            k = mx.concatenate([kept[0], k], axis=2)  # (B, n_heads, S, head_size)
            v = mx.concatenate([kept[1], v], axis=2)  # (B, n_heads, S, head_size)
        kept[:] = k, v  # for the next call
        return q, k, v

    mha.qkv = qkv


def generate(model, tokens, max_new_tokens, temperature=1.0, top_k=None):
    """Yields max_new_tokens tokens that continue tokens, a list of at least one, as they are made.

    When all ctx_len positions are taken, the last half of them is read again, from position 0 on:
    wpe has no row beyond, and the kept keys and values belong to the old positions. Half, because
    reading all but one again for each character would save nothing. So in a long text the model
    sees between half of ctx_len and all of it.
    """
    tokens, start = list(tokens)[-model.ctx_len :], 0
    for _ in range(max_new_tokens):
        if start == 0:  # a fresh copy, which remembers nothing yet; the model stays as it is
            reader = copy.deepcopy(model).eval()
            for block in reader.blocks:
                remember(block.mha)
        logits = reader(mx.array([tokens[start:]]), start)  # (1, T, vocab_size), T new tokens
        token = sample(logits[0, -1], temperature, top_k)
        yield token
        start = len(tokens)
        tokens.append(token)
        if len(tokens) > model.ctx_len:
            tokens, start = tokens[-max(1, model.ctx_len // 2) :], 0


GPT.generate = generate  # so that model.generate(tokens, 100) works, too

# ---------------------------------------------------------------------------------------------
# 11. Conveniences
#
# You have seen all of GPT. What follows keeps a run in a file, shows how it goes, looks inside the
# model, shares the work, and says in one line what is wrong when something is.

MODEL, FORMER, WRITTEN = "model.safetensors", "former.safetensors", "completions.txt"
SETTINGS = {name: limits for names, *limits in (  # type, least value, what it must stay below
    ("ctx_len n_emb n_heads n_layers num_epochs batch_size max_new_tokens top_k", int, 1, 10**9),
    ("warmup_steps seed", int, 0, 2**32), ("weight_decay temperature", float, 0, 1e38),
    ("lr max_norm", float, 1e-30, 1e38), ("dropout beta1 beta2", float, 0, 1),
) for name in names.split()}
SHAPE = ("ctx_len", "n_emb", "n_heads", "n_layers")  # the settings that make a model
FREE = "num_epochs max_new_tokens temperature top_k vocab history".split()  # --resume allows others
ONE_LINE, BLOCKS = str.maketrans("\n\t", "⏎ "), " ▁▂▃▄▅▆▇█"
STREAMS = mx.new_stream(mx.cpu), mx.new_stream(mx.cpu)  # each is worked on by one core


class Refusal(Exception):
    """Something that the user has to mend. main() says it in one line."""


def require(condition, problem):
    """Raises Refusal if the condition does not hold."""
    if not condition:
        raise Refusal(problem)


def check():
    """The settings by their names. Raises Refusal at the first that cannot be used."""
    for name, (kind, low, high) in SETTINGS.items():
        value = globals()[name]
        require(type(value) in (int, kind) and low <= value < high,
                f"{name} = {value!r} must be of type {kind.__name__}, from {low} to below {high}")
    require(n_emb % n_heads == 0, f"{n_emb = } must be a multiple of {n_heads = }")
    return {name: globals()[name] for name in SETTINGS}


def changes(then, now):
    """How the notes `now` differ from what they were then, in words."""
    return ", ".join(f"{n} {then.get(n)} to {now[n]}" for n in now if then.get(n) != now[n])


def fingerprint(text, arrays=()):
    """The SHA-256 of a text and of the numbers in pairs (name, array), sorted by their names."""
    return hashlib.sha256(text.encode() + b"".join(bytes(a) for _, a in sorted(arrays))).hexdigest()


def replace(path, data):
    """Writes a file whole, or else leaves it as it was and raises OSError."""
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=".") as folder:
        Path(folder, path).write_bytes(data)
        os.replace(Path(folder, path), path)


def save(run, notes):
    """Keeps a run in one file: a tree of arrays, and notes in words.

    Before the first save of a run, the former one is copied to a file of its own.
    """
    arrays, words, file = tree_flatten(run), json.dumps(notes), io.BytesIO()
    mx.save_safetensors(file, dict(arrays), {"notes": words, "sha256": fingerprint(words, arrays)})
    if len(notes["history"]) == 1 and os.path.exists(MODEL):
        replace(FORMER, Path(MODEL).read_bytes())
    replace(MODEL, file.getvalue())


def load(path, expected={}):
    """The tree and the notes that save() wrote.

    Raises Refusal if the file is not as it left it, or if notes are not as expected.
    """
    try:
        arrays, metadata = mx.load(path, return_metadata=True)
        require(metadata["sha256"] == fingerprint(metadata["notes"], arrays.items()), "damaged")
    except Exception:  # whatever goes wrong here, the file is none of ours
        raise Refusal(f"{path} is missing, unreadable or damaged: train.py makes one") from None
    notes = json.loads(metadata["notes"])
    different = changes(notes, expected)
    require(not different, f"{path} is of another run: {different}")
    return tree_unflatten(arrays), notes


def adopt(module, new):
    """Gives a module new arrays. Raises Refusal unless names, shapes and types are as before.

    The script may have been edited since it saved them.
    """
    ours, theirs = ({name: (x.shape, x.dtype) for name, x in tree_flatten(tree)}
                    for tree in (module.parameters(), new))
    require(ours == theirs, f"{MODEL} does not fit this script: one of them was changed")
    module.update(new)


def load_model(prompt=""):
    """The best saved model, its tokenizer, and the prompt, if all its characters are known.

    The settings that make a model become those of its run.
    """
    saved, notes = load(MODEL)
    del saved["last"], saved["optimizer"]
    globals().update({name: notes[name] for name in SHAPE})
    check()
    mx.disable_compile()  # or Ctrl-C could reach a compiler
    model, tokenizer = GPT(len(notes["vocab"])), CharTokenizer(notes["vocab"])
    adopt(model, saved)
    for char in prompt:
        require(char in notes["vocab"], f"{char!r} is not one of the known {notes['vocab']!r}")
    return model.eval(), tokenizer, prompt


def shared_loss(model, x, y):
    """loss_fn by two cores of a CPU, if the rows are even. In training, of this process's share."""
    world = mx.distributed.init()
    rank, size = (world.rank(), world.size()) if model.training else (0, 1)
    for _ in range(rank):
        mx.random.uniform()  # moves chance on, so that not all drop the same values
    x, y = x[rank::size], y[rank::size]
    if mx.default_device() != mx.cpu or len(x) % 2 == 1:
        return loss_fn(model, x, y)
    with mx.stream(STREAMS[0]):
        half = loss_fn(model, x[::2], y[::2])
    with mx.stream(STREAMS[1]):
        return (half + loss_fn(model, x[1::2], y[1::2])) / 2


def say(line, passing=False):
    """Prints a line. In a terminal it takes the place of a passing one."""
    terminal = sys.stdout.isatty()
    print("\r\033[K" * terminal + line, end="" if passing and terminal else "\n", flush=True)


def watch_steps(done, steps):
    """Tells of progress, after `done` steps, with `steps` an epoch. Raises Refusal at nan.

    A generator: it runs up to a yield and waits there until send() brings it the next loss.
    """
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it would reach the compiler, too
    mx.eval((yield))  # the first loss that is sent: now all is compiled
    signal.signal(signal.SIGINT, interrupt)
    started = spoken = time.perf_counter()
    total, pause = num_epochs * steps, 1 if sys.stdout.isatty() else 30
    for step in itertools.count(done + 2):
        loss = yield
        if step % 200 == 0 or step % steps == 0 or time.perf_counter() - spoken > pause:
            value, spoken = loss.item(), time.perf_counter()  # .item() waits for the device
            require(math.isfinite(value),
                    f"loss is {value} in step {step:,}: lower lr, weight_decay, beta1 or beta2")
            pace = (spoken - started) / (step - done - 1)  # seconds for a step
            left = f"{pace * (total - step) / 60:.1f} min left" if step % steps else "validating"
            say(f"step {step:,} of {total:,}, loss {value:.2f}, "
                f"{batch_size * ctx_len / pace:,.0f} characters/s, {left}", passing=True)


def write(model, tokenizer, prompt, length):
    """Yields the characters that continue the prompt, or a newline. One seed, one text."""
    prompt = prompt or min(tokenizer.vocab, key=lambda char: char != "\n")  # if there is any
    mx.random.seed(seed)
    for token in model.generate(tokenizer.encode(prompt), length, temperature, top_k):
        yield tokenizer.decode([token])


def type_out(model, tokenizer, prompt):
    """Prints the prompt and how the model continues it, as it is made."""
    for char in itertools.chain(prompt, write(model, tokenizer, prompt, max_new_tokens), "\n"):
        print(char, end="", flush=True)


def draw_curves(history):
    """Prints train and validation losses as two rows of blocks on one scale."""
    low, high = min(map(min, history)), max(map(max, history))
    for name, losses in zip(("train", "val"), zip(*history)):
        row = "".join(BLOCKS[1 + round(7 * (v - low) / (high - low or 1))] for v in losses)
        print(f"{name:>5} {losses[0]:.4f} {row} {losses[-1]:.4f}")


def look(model, tokenizer, prompt):
    """Draws what the prompt's last character looks at, what may come next, and what is alike."""
    require(0 < len(prompt) <= ctx_len, f"the prompt must have 1 to {ctx_len} characters")
    say(" " * 18 + prompt.translate(ONE_LINE))
    x = model.wte(mx.array([tokenizer.encode(prompt)])) + model.wpe(mx.arange(len(prompt)))
    for i, block in enumerate(model.blocks):
        q, k, _ = block.mha.qkv(block.ln_1(x))
        for head, row in enumerate(block.mha.weights(q, k)[0, :, -1].tolist()):
            say(f"block {i}, head {head:<4}" + "".join(BLOCKS[round(8 * v)] for v in row))
        x = block(x)
    p = mx.softmax(model.lm_head(model.ln_f(x))[0, -1]).tolist()  # vocab_size of them
    for share, char in sorted(zip(p, tokenizer.vocab), reverse=True)[:8]:
        say(f"next {char!r:>12} {share:.2f} {'█' * round(50 * share)}")
    rows = model.wte.weight - model.wte.weight.mean(axis=0)  # (vocab_size, n_emb)
    rows = rows / mx.linalg.norm(rows, axis=1, keepdims=True)
    for token in tokenizer.encode(sorted(set(prompt))):
        alike = mx.argsort(-(rows @ rows[token]))[:6].tolist()
        say("alike in wte:     " + " ".join(map(repr, tokenizer.decode(alike))))


# ---------------------------------------------------------------------------------------------
# 12. The run
#
# All of it put together: the text to tokens, a new model, the training, and some text at the end.


def train_and_write(resuming):
    """The whole run: reads input.txt, trains, saves after each epoch, and writes some text."""
    settings, text, size = check(), load_text(), mx.distributed.init().size()
    tokenizer = CharTokenizer(text)
    parts = train_tokens, val_tokens = split(np.array(tokenizer.encode(text), dtype=np.int32))
    steps = count_batches(train_tokens, batch_size)
    require(steps > 0 and len(val_tokens) > ctx_len, f"input.txt, of {len(text)} characters, is "
            f"too short for a batch of {batch_size} rows of {ctx_len}")
    require(batch_size % size == 0, f"{batch_size = } must be a multiple of {size} processes")
    tempfile.TemporaryFile(dir=".").close()  # better to fail now than after the training
    for name in filter(os.path.exists, (MODEL, FORMER, WRITTEN)):
        open(name, "ab").close()

    mx.random.seed(seed)
    model, optimizer = GPT(tokenizer.vocab_size), make_optimizer(num_epochs * steps)
    optimizer.init(model.trainable_parameters())
    run = copy.deepcopy(model)  # the best weights, and what is needed to go on from the last
    run.last, run.optimizer = model, optimizer.state
    notes = {**settings, "input.txt": fingerprint(text)[:16], "vocab": "".join(tokenizer.vocab)}
    history = notes["history"] = []
    if resuming:
        saved, then = load(MODEL, {name: notes[name] for name in notes if name not in FREE})
        history += then["history"]
        require(len(history) < num_epochs, "the saved run is finished: a larger num_epochs goes on")
        adopt(run, saved)
    number = mx.array([int(fingerprint(json.dumps(notes))[:7], 16)])
    require(mx.all(mx.distributed.all_gather(number) == number),
            f"the processes differ: settings, input.txt and {MODEL} must be the same")
    watch = watch_steps(len(history) * steps, steps)
    next(watch)

    def report(title, train_loss, val_loss):
        say(f"{title} | train = {train_loss:.4f} | val = {val_loss:.4f} | "
            f"as unsure as between {math.exp(min(99, val_loss)):.1f} letters\n"
            f"          {''.join(write(model, tokenizer, '', 70)).translate(ONE_LINE)}")

    say(f"The {'small ' * small}model: {', '.join(f'{name} {notes[name]}' for name in SHAPE)}, "
        f"{sum(weight.size for _, weight in tree_flatten(model.parameters())):,} parameters")
    say(f"The text: {len(text):,} characters of {tokenizer.vocab_size} kinds. "
        f"Blind guessing costs ln {tokenizer.vocab_size} = {math.log(tokenizer.vocab_size):.4f}")
    # A piece of each part is enough. When resuming, too: it compiles what evaluate needs.
    losses = [evaluate(model, part[: 100 * ctx_len]) for part in parts]
    if not resuming:
        report("Untrained", *losses)
    say("Compiling the step, which can take a minute, and cannot be interrupted", passing=True)
    try:
        epochs = train(model, optimizer, *parts, len(history), shared_loss, watch.send)
        for epoch, *losses in epochs:
            require(math.isfinite(sum(losses)), f"losses are {losses} in epoch {epoch}: lower lr")
            longer = [*history, losses]
            if losses[1] == min(val for _, val in longer):
                run.update(model.parameters())
            if mx.distributed.init().rank() == 0:
                save(run.parameters(), {**notes, "history": longer})
            history.append(losses)  # now it is in the file
            report(f"Epoch {epoch}", *losses)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped. Epochs of this run in {MODEL}: {len(history)}"
                                + ". --resume goes on from there" * bool(history)) from None
    if len(history) > 1:
        draw_curves(history)
    say(f"{MODEL} holds the run. Its best weights now write {WRITTEN}. For more of it:\n"
        "python train.py --sample, or --look with some words of the text\n")
    written = "".join(write(run, tokenizer, "", max_new_tokens))
    replace(WRITTEN, written.encode())
    say(written)
    with suppress(Refusal):  # if there is a former run, with the same text
        former = load(FORMER, {"input.txt": notes["input.txt"]})[1]
        old, new = (min(val for _, val in each["history"]) for each in (former, notes))
        say(f"Since {FORMER}: {changes(former, settings) or 'no other setting'}, "
            f"best val {old:.4f} to {new:.4f}")


def main():
    if small and mx.default_device() == mx.cpu:  # faster, if MLX looks less far ahead for work
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "8")
    rank = mx.distributed.init().rank()
    if rank > 0 or sys.stdout is None:  # of several processes only the first talks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    with suppress(AttributeError):  # some notebooks have none
        sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    try:
        match sys.argv[1:]:
            case [] | ["--resume"] as words: train_and_write(resuming=bool(words))
            case ["--sample", *prompt] if len(prompt) < 2: type_out(*load_model(*prompt))
            case ["--look", prompt]: look(*load_model(prompt))
            case _: raise Refusal("it is used like this:\n\n" + __doc__.split("\n\n")[1])
    except (Refusal, OSError, UnicodeDecodeError, KeyboardInterrupt, RuntimeError) as error:
        problem = str(error) or "stopped"
        gone = isinstance(error, BrokenPipeError) or "[ring]" in problem  # a reader, or a process
        match error:
            case UnicodeDecodeError(): problem = f"input.txt is not UTF-8: {problem}"
            case RuntimeError() if re.search(r"shared library|filesystem|\[Compile", problem):
                problem = problem.splitlines()[0] + ": delete that, or set MLX_DISABLE_COMPILE=1"
            case RuntimeError() if not gone: raise
        time.sleep(5 * (rank > 0))  # if the first says the same, the launcher ends this one
        if not gone:
            print("\n" * sys.stdout.isatty() + f"train.py: {problem}", file=sys.stderr)
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 2)  # the output may be broken


if __name__ == "__main__":
    main()
