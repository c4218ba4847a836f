"""GPT-2 from scratch in MLX: a tutorial in one file.

    python train.py                     train on input.txt, then generate text
    python train.py --sample "To be"    continue a prompt with the trained model
    python train.py --look "To be"      show what it attends to and what it predicts next
    python train.py --resume            resume an interrupted run

GPT-2 is a *transformer*, a neural network that reads text and predicts what comes next: here, one
character at a time. We build it, train it, and let it write.

     1. Settings     5. Loss and learning     9. Training
     2. Data         6. Attention            10. Sampling
     3. Tokenizer    7. MLP and block        11. Checks and files, 12. Prompts and pictures:
     4. Batches      8. GPT                      conveniences, which a first reading may skip
                                             13. The run, 14. The command line

Read from the top: each section uses only what comes before it. Then change something, run it
again, and compare the validation loss, the loss on text held out from training. Lower is better.
Uniform guessing scores 4.17. On the shipped input.txt the small model, for machines without a GPU,
reaches 1.55, and the default model 1.25.

First things to try: `temperature` (section 1), a text of your own in input.txt, `n_heads = 1`.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26.4", "mlx>=0.32.4", "mlx[cpu]>=0.32.4; sys_platform == 'linux'",
#                 "mlx-cpu>=0.32.4; sys_platform == 'win32'"]
# ///

import argparse
import json
import math
import os
import shutil
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

# %% 1. Settings
#
# These are the *hyperparameters*, the numbers we choose. (*Parameters* are the numbers that
# training finds.) On a first reading, skip them: each is explained where it is used.

small = mx.default_device() == mx.cpu  # without a GPU, the default model would take hours

if not small:
    ctx_len = 128  # context length: how many characters the model can look back on
    n_emb = 128  # embedding size; must be a multiple of n_heads
    n_heads = 4  # attention heads per block
    n_layers = 3  # blocks
    dropout = 0.03  # share of activations zeroed in training; raise it if the model overfits
    num_epochs = 20  # passes over the training text; lower it if the model overfits
    batch_size = 32  # rows of text per step; raise it for fewer, less noisy steps
    lr = 3e-3  # peak learning rate; lower it if the loss jumps around or becomes nan
else:
    ctx_len = 48
    n_emb = 56
    n_heads = 7
    n_layers = 1
    dropout = 0.0
    num_epochs = 3
    batch_size = 8
    lr = 1e-2

warmup_steps = 100  # steps over which the learning rate rises to its peak
weight_decay = 0.1  # how strongly AdamW pulls weights toward 0; raise it if the model overfits
beta1 = 0.9  # decay rate of AdamW's average of the gradient
beta2 = 0.99  # decay rate of AdamW's average of the squared gradient
max_norm = 1.0  # a gradient longer than this is scaled down to it
seed = 0  # random seed

max_new_tokens = 1000  # length of the generated text, in characters
temperature = 0.8  # 0: always the most likely character; 1: unchanged; above 1: more random
top_k = 40  # sample only from this many most likely characters; try 5

# %% 2. Data
#
# All our data is one text file. The model learns from the first nine tenths of it, the *training
# set*. The last tenth, the *validation set*, is held out. Only on text that it has never seen can
# the model show whether it learned the language or merely memorized the text (*overfitting*).


def load_text(path="input.txt"):
    """The text of a UTF-8 file. Raises OSError or UnicodeDecodeError if it cannot be read."""
    return Path(path).read_text(encoding="utf-8-sig")  # -sig: skip the mark some editors put first


def split(text):
    """The first nine tenths of a text, and the last tenth.

    >>> split("abcdefghij")
    ('abcdefghi', 'j')
    """
    boundary = len(text) * 9 // 10
    return text[:boundary], text[boundary:]


# %% 3. Tokenizer
#
# A neural network computes with numbers, so we turn each character into one, called a *token*:
# its position in the sorted list of all different characters, the *vocabulary*.
#
# GPT-2's own vocabulary has 50,257 tokens, most of them pieces of words. With those a text is
# shorter, but single characters need no explanation, and the model does not care.


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
        """A string to a list of ints. Raises KeyError at a character that is not in vocab."""
        return [self.token_of[char] for char in text]

    def decode(self, tokens):
        """A list of ints to a string."""
        return "".join(self.vocab[token] for token in tokens)


# %% 4. Batches
#
# The model is a *language model*: given the characters so far, it predicts the next one. So the
# *targets*, the right answers, are the text itself, shifted by one. The shipped text begins with
# "First Citizen:". Cut into rows of T = 8 tokens, its beginning gives
#
#     x = 18 47 56 57 58  1 15 47        F i r s t _ C i
#     y = 47 56 57 58  1 15 47 58        i r s t _ C i t
#
# One row holds T examples: after "F" comes "i", after "Fi" comes "r", and so on, up to "First Ci",
# after which comes "t". The model answers all T at once, one at each *position* of the row. B rows
# form a *batch*, an array of shape (B, T). The rows of a batch know nothing of each other.
#
# One pass over the training set is an *epoch*. If every epoch cut the text at the same places, the
# first token of a row would never be seen with the text before it. So each epoch starts cutting
# at a random place among the first T tokens, and takes the rows in random order.
#
# We cut the text with NumPy (np). The model will compute with MLX (mx), a library of similar
# arrays that can use the GPU of a Mac.


def count_batches(tokens, ctx_len, batch_size):
    """How many batches get_batches() makes of tokens if it is given an rng."""
    rows = (len(tokens) - 1) // ctx_len - 1  # the random start costs one row
    return rows // batch_size


def get_batches(tokens, ctx_len, batch_size, rng=None):
    """Yields (x, y), both (B, T) with T = ctx_len, where y holds the token after each one in x.

    tokens is a NumPy array of ints. With rng, a NumPy random generator, rows are cut and ordered
    at random, and rows that do not fill a batch are left out: for training. Without it, all rows
    come in order, and the last batch may be smaller: for measuring the loss.

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
        starts = rng.permutation(starts[:-1]) + rng.integers(ctx_len)
        starts = starts[: len(starts) // batch_size * batch_size]
    for i in range(0, len(starts), batch_size):
        rows = [tokens[s : s + ctx_len + 1] for s in starts[i : i + batch_size]]
        rows = np.stack(rows)  # (B, T + 1): one more, for the last target
        yield mx.array(rows[:, :-1]), mx.array(rows[:, 1:])  # (B, T) each


# %% 5. Loss and learning
#
# Before we build the model, let's decide how to score it. At each position it gives every token
# of the vocabulary a score, called a *logit*. *Softmax* turns the V logits s of a position into a
# probability distribution, positive numbers that sum to 1:
#
#     p_i = exp(s_i) / (exp(s_1) + ... + exp(s_V))        (2, 1, 0) -> (0.67, 0.24, 0.09)
#
# The *loss* is -ln p, where p is the probability that the model gave to the token that came next:
#
#     p        1       0.22     1/65      0.001
#     loss     0       1.5      4.17      6.9
#
# Why a logarithm? The probability of a whole text is the product of the probabilities of its
# tokens, one after the other. A logarithm turns the product into a sum, so the lower the sum of
# the losses, the more likely the model finds the text. Its mean per token is the *cross-entropy*,
# in nats (for natural logarithm). exp(loss) is the *perplexity*: at a loss of 1.5 the model is as
# unsure as if it chose among exp(1.5) = 4.5 equally likely characters.
#
# What is a good loss? Uniform guessing among 65 characters scores ln 65 = 4.17. An *n-gram model*
# counts how often each string of n characters occurs in the training set. On the shipped text:
#
#     n        1       2       3       4       5       6       7
#     loss     3.24    2.36    1.83    1.51    1.38    1.34    1.33


def loss_fn(model, x, y):
    """The mean cross-entropy, a scalar array, in nats per token. x and y are (B, T)."""
    logits = model(x)  # (B, T, V)
    return nn.losses.cross_entropy(logits, y, reduction="mean")  # softmax, -ln p, mean


# To *learn* is to change the parameters so that the loss falls. Take a model with one parameter, w,
# for a language of two letters. The logit of "a" is w and the logit of "b" is 0, so the probability
# of "a" is p = exp(w) / (exp(w) + 1). In the training text 3 of 4 letters are "a". Then the loss is
# -(3/4) ln p - (1/4) ln(1 - p).
#
# Which way should w go? At w = 0 the loss is 0.6931. Nudge w by 0.001, and the loss falls by
# 0.00025. Their ratio, -0.25, is the *gradient*: how fast the loss grows as w grows. Here it is
# negative, so we raise w. *Gradient descent* moves w a little against its gradient, again and
# again. With w = w - 2 * gradient, where 2 is the *learning rate*,
#
#     w           0        0.5      0.755    0.895    ...   1.099
#     p           0.5      0.622    0.680    0.710    ...   0.75
#     loss        0.6931   0.5991   0.5740   0.5664   ...   0.5623
#     gradient   -0.25    -0.128   -0.070   -0.040    ...   0
#
# It ends where p is the true share, 3/4. The loss is not 0 there, and it cannot be: which letter
# comes next is partly chance. With a learning rate of 20 the first step leads to w = 5, far past
# the goal, and the loss there is 1.26, worse than at the start.
#
# A real model has far too many parameters to nudge one by one. *Backpropagation* finds all
# gradients in one pass, backward from the loss. It rests on the *chain rule*: slopes multiply.
#
#         slope 3       slope -2
#     w ----------> z ----------> loss          gradient for w: 3 * -2 = -6
#
# If z grows 3 times as fast as w, and the loss falls 2 times as fast as z grows, then the loss
# falls 6 times as fast as w grows. What was found for z serves every parameter that z depends on.
# And where a number is used in several places, its slopes add: 3 * w + 2 * w has slope 5.
#
# The loss of a batch is a mean over its examples, so its gradient is a mean, too. What would help
# only one example mostly cancels out, and what helps many remains. Descending with the gradient of
# a random batch, not of the whole text, is called *stochastic* gradient descent.

# %% 6. Attention
#
# Inside the model each character is a vector of n_emb learned numbers. To predict what comes next,
# a position needs information from the positions before it. The simplest way to get it is to
# average. For three positions, with one row for each position that looks, the weights are
#
#     1    0    0          = softmax(0, -inf, -inf)
#     1/2  1/2  0          = softmax(0,    0, -inf)
#     1/3  1/3  1/3        = softmax(0,    0,    0)
#
# Softmax gives equal scores equal weights, and a score of -inf no weight, as exp(-inf) = 0. The
# -infs form the *causal mask*. It hides the future, which holds the very answer we ask for. A model
# that saw it would learn to copy, and when it writes there is nothing on the right to copy.
#
# *Self-attention* keeps the mask and computes the other scores from the vectors themselves. Three
# learned matrices turn each vector into three shorter ones, of head_size numbers:
#
#     *query*    what I am looking for           *key*      what others can find me by
#     *value*    what I pass on to those who find me
#
# The score of one position for another is the *dot product* of its query and the other's key:
# multiply entry by entry and add, so (1, 2) and (3, 4) give 1 * 3 + 2 * 4 = 11. It is large when
# the two point the same way. The product of two matrices, a @ b, holds the dot product of each row
# of a with each column of b. So q @ k.mT computes all scores at once: .mT makes columns of the rows
# of k. The softmax of the scores is the *attention weights*, and weights @ v is the new averages.


def attention_weights(q, k):
    """softmax(q k^T / sqrt(head_size)), with the future masked (Vaswani et al., 2017, eq. 1).

    q is (..., T, head_size), k is (..., S, head_size), and the result is (..., T, S): a row for
    each query, a column for each key, and each row sums to 1. The dots stand for any axes: none
    for a single head, (B, n_heads) in the model. The T queries belong to the last T of the S
    positions. In training T = S. Section 10 will have more keys than queries.

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
    # A column of T positions and a row of S are stretched to (T, S) (*broadcasting*), so that each
    # position is compared with each.
    is_later = mx.arange(S - T, S)[:, None] < mx.arange(S)  # (T, S)
    scores = mx.where(is_later, -mx.inf, scores)  # (..., T, S)
    return mx.softmax(scores, axis=-1)


# Why is it divided by sqrt(head_size), *scaled*? The *variance* of numbers with mean 0 is the mean
# of their squares. Its square root, the *standard deviation*, says how large they typically are.
# If the entries of queries and keys are independent, with mean 0 and variance 1, then each product
# in a score has variance 1, and the sum of head_size of them has variance head_size. So a typical
# score grows with the square root of head_size, and softmax soon looks at one position only:
#
#     head_size              1        8        32       128
#     sqrt(head_size)        1        2.83     5.66     11.31
#     softmax(that, 0)[0]    0.731    0.944    0.997    1.000
#
# Divided by the root, it starts at softmax(1, 0) = (0.731, 0.269) for any head_size. That is the
# general argument. In a model as small as ours, you may find no difference without it.


@dataclass
class GPTConfig:
    """The sizes of a model, and its dropout."""

    vocab_size: int
    ctx_len: int
    n_emb: int
    n_heads: int
    n_layers: int
    dropout: float


# One attention *head* makes one average, so it can look for one kind of thing. We want several
# heads, which look for several kinds. Each gets head_size = n_emb / n_heads numbers in its queries,
# keys, and values. The results are put side by side, which makes n_emb numbers again, and a last
# matrix, c_proj ("projection"), mixes what the heads have found.
#
# One matrix makes the queries of all heads at once, (B, T, n_emb), which are then cut into heads.
# A product @ works on the last two axes and does so for each entry of the axes before them. So
# the heads must come before the positions:
#
#     (B, n_heads, T, head_size) @ (B, n_heads, head_size, T) = (B, n_heads, T, T)
#
# *Dropout* sets a random share of its input to 0 and scales up the rest to make up for it. No part
# of the model can rely on any single number then, which makes memorizing harder. It acts only in
# training: model.train() turns it on, and model.eval() turns it off.
#
# In MLX, a part of a model is a class derived from nn.Module, and calling the object runs its
# __call__ method. nn.Linear(a, b) turns vectors of a numbers into vectors of b numbers, by a matrix
# and b numbers to add, called *biases*. (The bias of k_proj has no effect: it adds the same number
# to all scores of a query, which softmax ignores. GPT-2 has it all the same.)
#
# MLX has a fast function for what we write out: mx.fast.scaled_dot_product_attention. It does not
# return the weights, so they could be neither looked at nor dropped out.


class MultiHeadAttention(nn.Module):
    """Causal self-attention, (B, T, n_emb) to (B, T, n_emb). n_emb is a multiple of n_heads."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.q_proj = nn.Linear(config.n_emb, config.n_emb)
        self.k_proj = nn.Linear(config.n_emb, config.n_emb)
        self.v_proj = nn.Linear(config.n_emb, config.n_emb)
        self.c_proj = nn.Linear(config.n_emb, config.n_emb)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def split_heads(self, x):
        """(B, T, n_emb) to (B, n_heads, T, head_size).

        The transpose at the end matters. Four positions with two numbers each, for two heads:

        >>> x = np.arange(8).reshape(4, 2)  # the positions have (0, 1), (2, 3), (4, 5), (6, 7)
        >>> print(x.reshape(4, 2, 1).transpose(1, 0, 2)[:, :, 0])  # right: a part of each position
        [[0 2 4 6]
         [1 3 5 7]]
        >>> print(x.reshape(2, 4, 1)[:, :, 0])  # wrong: a head has two whole positions
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
        if cache is not None:  # only when the model writes: section 10
            k, v = cache.update_and_fetch(k, v)  # (B, n_heads, S, head_size)
        weights = attention_weights(q, k)  # (B, n_heads, T, S)
        out = self.attn_dropout(weights) @ v  # (B, n_heads, T, head_size)
        out = out.transpose(0, 2, 1, 3)  # (B, T, n_heads, head_size)
        out = out.reshape(x.shape)  # (B, T, n_emb): the heads side by side
        return self.resid_dropout(self.c_proj(out))


# %% 7. MLP and block
#
# Attention moves information between positions. Then the *MLP* (multilayer perceptron) works on
# what has arrived, at each position by itself. It is two linear layers with a nonlinear *activation
# function* between them. Without that function the two could do no more than one, as (x @ M) @ N =
# x @ (M @ N). GPT-2 uses *GELU*: x times the probability that a random number from the standard
# normal distribution (the bell curve with mean 0 and variance 1) is below x. The "approx" in its
# name below is a formula with tanh, off by less than 0.001, which GPT-2 uses, too.
#
#     x           -3       -0.75    0        1        3
#     gelu(x)     -0.004   -0.170   0        0.841    2.996
#
# So it is about 0 on the far left, dips a little, and is about x on the right. The first layer
# (c_fc, "fully connected") makes 4 * n_emb numbers, the answers to as many small questions about
# the vector. The second adds up from them what is to change. The 4 is a custom that works well.
# (Hendrycks and Gimpel, Gaussian Error Linear Units, 2016)


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


# A *block* is one attention layer and one MLP:
#
#     x ---+---------------------->(+)---+---------------->(+)---> x
#          |                        ^    |                  ^
#          +--> ln_1 --> attention -+    +--> ln_2 --> MLP -+
#
# What a layer computes is added to x and does not replace it (a *residual connection*). So a layer
# only has to learn what to change. The vector that flows straight through all blocks is called the
# *residual stream*. It also carries the gradient back to the first block. Without it, slopes
# multiply: after twelve layers with slopes of 1/2, only 1/4096 of the gradient is left (*vanishing
# gradient*). But the slope of x + f(x) is 1 + f'(x), so along the stream it passes undiminished.
# (He et al., Deep Residual Learning for Image Recognition, 2015)
#
# *LayerNorm* keeps the numbers at a size that suits the layers. It takes each vector by itself
# and shifts and scales it to mean 0 and variance 1:
#
#     x                                   1        2        6
#     minus the mean, 3                  -2       -1        3
#     divided by the root of 14/3        -0.93    -0.46     1.39        14/3 = (4 + 1 + 9) / 3
#
# Then it multiplies each number by a learned *gain* and adds a learned bias. In GPT-2 it stands
# before attention and MLP, off the residual stream (*pre-norm*). The numbers in the names ln_1 and
# ln_2 are GPT-2's. (Ba et al., Layer Normalization, 2016)


class Block(nn.Module):
    """Communication, then computation: (B, T, n_emb) to (B, T, n_emb)."""

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
# How does a character become a vector? The model has a table, wte (weights of the token embedding),
# with a row of n_emb learned numbers for each token. It simply looks the row up. Characters that
# behave alike get similar rows.
#
# The vector must also say where the character stands. A sum has no order, so to attention the "a"
# of "tea" and the "a" of "eta" would see the same thing: an e and a t. So there is a second table,
# wpe (weights of the position embedding), with a row for each position, and the two are added. This
# is why the model cannot see more than ctx_len characters: wpe has no further row.
#
# At the end, a last LayerNorm, ln_f ("final"), and the *head*: the logit of a token is the dot
# product of the position's vector with that token's row of wte. So one table serves at both ends
# (*weight tying*; Press and Wolf, Using the Output Embedding, 2016).
#
# The parameters start at random. If they were all equal, they would get equal gradients and stay
# equal. They start small, so that all logits are close to 0 and no character is preferred: the
# first loss must be close to ln vocab_size, or something is wrong.


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
        self.update(tree_map_with_path(self.init_weight, self.parameters()))

    def init_weight(self, name, weight):
        """The initial value of the parameter with this name, such as blocks.0.mha.c_proj.weight."""
        if name.endswith("bias"):
            return mx.zeros_like(weight)
        if weight.ndim == 1:  # the gains of LayerNorm
            return mx.ones_like(weight)
        std = 0.02  # GPT-2's standard deviation
        if name.endswith("c_proj.weight"):
            # Each block adds the outputs of two c_proj layers to the residual stream. A sum of N
            # independent numbers is sqrt(N) times as large as one. This makes up for it.
            std = 0.02 / math.sqrt(2 * self.config.n_layers)
        return mx.random.normal(weight.shape, scale=std)

    def __call__(self, tokens, caches=None):
        if caches is None:
            caches = [None] * len(self.blocks)
            start = 0
        else:  # only when the model writes: section 10
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
        return self.wte.as_linear(x)  # (B, T, vocab_size)


# With the default settings and 65 characters, the parameters are
#
#     wte          65 x 128                                    8,320
#     wpe         128 x 128                                   16,384
#     a block     ln_1 and ln_2                  512
#                 mha: q, k, v            3 x 16,512
#                      c_proj                 16,512
#                 mlp: c_fc                   66,048
#                      c_proj                 65,664
#                                            198,272   x 3   594,816
#     ln_f                                                       256
#                                                            619,776
#
# So nearly all of them are in the blocks, and two thirds of a block are its MLP. The smallest GPT-2
# is this model with n_emb = 768, 12 heads, 12 layers, ctx_len = 1024, and 50,257 tokens, which
# makes 124 million parameters. It differs in size, in its tokens, and in what and how it was
# trained, and in nothing else: the README shows how to load OpenAI's weights into this class.
# (Radford et al., Language Models are Unsupervised Multitask Learners, 2019)

# %% 9. Training
#
# A training step takes a batch and moves every parameter against its gradient. How far? Plain steps
# of lr * gradient, as in section 5, rarely suit all parameters at once: their gradients differ in
# size by orders of magnitude. *Adam* brings them to one scale. For each parameter it keeps two
# moving averages, m of its gradient g and v of the square of g (the first and second *moment*):
#
#     m = beta1 * m + (1 - beta1) * g
#     v = beta2 * v + (1 - beta2) * g * g
#     w = w - lr * m / sqrt(v)
#
# As long as g stays the same, be it 0.001 or 10, m / sqrt(v) is 1, and w moves by lr. If g strictly
# alternates between 1 and -1, m / sqrt(v) is only 0.05. With random signs, it is about 0.23. (m and
# v start at 0. The *bias correction* makes up for it. A tiny number keeps v from being 0.)
#
# AdamW adds *weight decay*: each step also shrinks w by lr * weight_decay * w, so that it stays
# large only if its gradient keeps it large. (Kingma and Ba, Adam, 2014; Loshchilov and Hutter,
# Decoupled Weight Decay Regularization, 2017)
#
# The learning rate rises, then falls (*warmup* and *linear decay*):
#
#     lr           /\
#                /    `-.
#     0        /          `-.
#              0  warmup     total_steps
#
# In the first steps m and v are made of a few noisy gradients, and every parameter would move by
# the full lr in a direction that is mostly chance. At the end a constant rate would keep the
# parameters jumping around the goal, since m / sqrt(v) does not shrink with the gradients.


def make_optimizer(total_steps):
    """AdamW for a run of total_steps steps, with warmup and linear decay."""

    def learning_rate(step):  # step is an mx.array: for a cosine use mx.cos, not math.cos
        rise = (step + 1) / max(1, warmup_steps)
        fall = 1 - step / total_steps
        return lr * mx.clip(mx.minimum(rise, fall), 0, 1)  # for a constant: return mx.array(lr)

    def is_decayed(name, weight):
        return name.startswith("blocks") and weight.ndim == 2

    # Only the matrices of the blocks are decayed. Biases and gains are left alone, and so are the
    # embeddings: the row of a rare token has no gradient most of the time and would only shrink.
    # MultiOptimizer gives the first optimizer what is_decayed picks and the second one the rest.
    betas = [beta1, beta2]
    decayed = optim.AdamW(learning_rate, betas, weight_decay=weight_decay, bias_correction=True)
    others = optim.AdamW(learning_rate, betas, weight_decay=0.0, bias_correction=True)
    return optim.MultiOptimizer([decayed, others], [is_decayed])


# Three ideas of MLX:
#
# *Lazy evaluation*. `a + b` computes nothing yet: it adds a node to a *computation graph*. The work
# is done when a value is needed, by .item() or print, or when mx.eval demands it. A loop that never
# asked for a value would only grow the graph.
#
# *Automatic differentiation*. nn.value_and_grad turns loss_fn into a function that returns the loss
# and its gradients by backpropagation, in a tree (nested dicts and lists) like model.parameters().
#
# *Compilation*. mx.compile *traces* a function: it runs the Python code once, records the
# operations, and from then on replays the recording. So, inside step,
#
#     print("hello")                 prints once
#     max_norm, changed later        keeps its old value
#     dropout                        stays on if it was on in the first call
#     parameters, m, v, randomness   do change, because `state` names them
#
# While you experiment with step, return it uncompiled: `return step`.


def make_step(model, optimizer, loss_fn):
    """The function step(x, y): it updates the model on one batch and returns the loss."""
    loss_and_grad = nn.value_and_grad(model, loss_fn)

    def step(x, y):
        loss, grads = loss_and_grad(model, x, y)
        grads = nn.average_gradients(grads)  # does nothing, unless several computers train together
        # Gradient clipping: if all gradients together, as one vector, are longer than max_norm,
        # they are scaled down to it. Otherwise m and v would long remember one odd batch.
        grads, _ = optim.clip_grad_norm(grads, max_norm)
        optimizer.update(model, grads)
        return loss

    state = [model.state, optimizer.state, mx.random.state]
    return mx.compile(step, inputs=state, outputs=state)


# How do we know that it learns? We measure the loss on both parts of the text. While both fall,
# train on. If the training loss falls and the validation loss rises, the model overfits: use more
# text, more dropout, fewer epochs, or a smaller model. The loop that calls all this is in section
# 13: for each epoch, for each batch, step(x, y).


def evaluate(model, tokens, loss_fn):
    """The mean loss over tokens, in nats per token. Leaves the model in eval mode."""
    model.eval()  # dropout off
    total = count = 0
    for x, y in get_batches(tokens, model.config.ctx_len, batch_size):
        total += loss_fn(model, x, y).item() * y.size  # the last batch can be smaller
        count += y.size
    return total / count


# %% 10. Sampling
#
# The model writes one token at a time, and each one is fed back in (*autoregressive* generation):
#
#     for _ in range(100):
#         logits = model(mx.array([tokens[-ctx_len:]]))  # (1, T, vocab_size)
#         tokens.append(sample(logits[0, -1]))  # the last position predicts what comes next
#
# Using a trained model is called *inference*. How do we choose the token? Always taking the most
# likely one, *greedy decoding*, soon repeats itself. So we draw one at random, with the model's
# probabilities. Dividing the logits by a *temperature* first makes it more careful or bolder:
#
#     logits             2      1      0
#     temperature 0.5    0.87   0.12   0.02
#     temperature 1      0.67   0.24   0.09
#     temperature 2      0.51   0.31   0.19
#
# *Top-k sampling* draws from the k most likely tokens only. There are many unlikely tokens. Each is
# rare, but now and then one is drawn, and derails the text. (Here, with 65 characters, 40 hardly
# matters.)


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
# only the new token through the model. Its query meets all S stored keys.
#
#     what goes through the model     without a cache     with a cache
#     first, the prompt "To be"       T o _ b e           T o _ b e
#     then the new character ","      T o _ b e ,         ,


class KVCache:
    """The keys and values of all positions that one attention layer has read."""

    def __init__(self):
        self.keys = None
        self.values = None
        self.offset = 0  # how many positions are stored, so also the position of the next token

    def update_and_fetch(self, k, v):
        """Appends k and v, (B, n_heads, T, head_size) each, and returns all S positions of both.

        The offset moves on by T. Code that needs the position of the new tokens, such as rotary
        embeddings, must read the offset before.
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
    afterwards.
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
            # All positions are taken. Start over with the newer half of the window, since each
            # token that stays gets a new position, and so new keys and values.
            window = window[-max(1, ctx_len // 2) :]
            unread = window
            caches = [KVCache() for _ in model.blocks]


# %% 11. Checks and files
#
# You have now seen all of GPT-2. The rest is convenience: it checks the settings, keeps the model
# in files, shows what the model does, and runs the training loop.

MODEL = "model.safetensors"  # the best weights of this run
FORMER = "former.safetensors"  # the best weights of the run before it
CHECKPOINT = "checkpoint.safetensors"  # what --resume needs
RUNS = "runs.jsonl"  # a diary, with a line for each finished run
COMPLETIONS = "completions.txt"  # the text generated at the end of a run

# The type of each setting, its smallest value, and the value it must stay below. Add a setting of
# your own here, too: then it is checked, noted in the diary, and compared by --resume.
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
MAY_CHANGE = ["num_epochs", "max_new_tokens", "temperature", "top_k"]  # before a --resume


class UserError(Exception):
    """An error the user can fix. main() shows it in one line, without a traceback."""


def check_settings():
    """The settings of section 1, as a dict. Raises UserError at one that cannot be used."""
    settings = {name: globals()[name] for name in LIMITS}
    for name, value in settings.items():
        kind, low, below = LIMITS[name]
        if kind is int and type(value) is not int:
            raise UserError(f"{name} = {value!r} must be a whole number")
        if type(value) not in (int, float) or not low <= value < below:
            raise UserError(f"{name} = {value!r} must be a number from {low} to below {below}")
    if n_emb % n_heads != 0:
        raise UserError(f"n_emb = {n_emb} must be a multiple of n_heads = {n_heads}")
    return settings


def changes(old, new):
    """The differences between two dicts of settings, in words: 'lr 0.01 to 0.001'."""
    different = [name for name in new if old.get(name) != new[name]]
    return ", ".join(f"{name} {old.get(name)} to {new[name]}" for name in different)


@contextmanager
def replacing(path):
    """For `with replacing(path) as unfinished:`, which writes to the file named unfinished.

    At the end of the block that file takes the place of path; after an error it is removed. So
    path never holds half a file.
    """
    unfinished = f"unfinished-{os.getpid()}-{path}"
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def save(path, tree, notes):
    """Writes a tree of arrays, and notes (a dict) beside it, to a safetensors file."""
    with replacing(path) as unfinished:
        mx.save_safetensors(unfinished, dict(tree_flatten(tree)), {"notes": json.dumps(notes)})


def load(path):
    """The tree of arrays and the notes that save() wrote. Raises UserError if it cannot."""
    if not os.path.exists(path):
        raise UserError(f"there is no {path} yet: run python train.py first")
    try:
        arrays, metadata = mx.load(path, return_metadata=True)
        notes = json.loads(metadata["notes"])
    except (RuntimeError, KeyError, ValueError):
        raise UserError(f"{path} is damaged, or train.py did not write it") from None
    return tree_unflatten(arrays), notes


def set_weights(model, weights):
    """Gives the model saved weights. Raises UserError unless all names and shapes match."""
    try:
        model.load_weights(tree_flatten(weights))
    except ValueError as error:
        raise UserError(f"the saved weights do not match train.py: {error}") from None


def save_model(path, model, tokenizer):
    """Saves the weights under their own names, with what load_model() needs beside them."""
    notes = {"config": asdict(model.config), "vocab": "".join(tokenizer.vocab)}
    save(path, model.parameters(), notes)


def load_model(path=MODEL):
    """A saved model, in eval mode, and its tokenizer. Raises UserError."""
    weights, notes = load(path)
    try:
        config = GPTConfig(**notes["config"])
        tokenizer = CharTokenizer(notes["vocab"])
    except (KeyError, TypeError):
        raise UserError(f"{path} holds no model of this train.py") from None
    model = GPT(config)
    set_weights(model, weights)
    model.eval()
    return model, tokenizer


# %% 12. Prompts and pictures


def check_prompt(tokenizer, prompt):
    """Raises UserError at a character that the model does not know."""
    for char in prompt:
        if char not in tokenizer.token_of:
            known = "".join(tokenizer.vocab)
            raise UserError(f"{char!r} is not one of the characters it knows: {known!r}")


def continue_text(model, tokenizer, prompt, length):
    """Yields `length` characters that continue the prompt. The same seed gives the same text."""
    mx.random.seed(seed)
    for token in generate(model, tokenizer.encode(prompt), length, temperature, top_k):
        yield tokenizer.decode([token])


def first_char(tokenizer):
    """What the model begins with if there is no prompt: in most texts, the newline."""
    return tokenizer.vocab[0]


def type_out(prompt):
    """Prints the prompt and how the saved model continues it, as it is generated."""
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
    """Numbers from 0 to 1, drawn as a row of bars.

    >>> bars([0.1, 0.5, 1.0])
    '▁▄█'
    """
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * min(share, 1))] for share in shares)


class Recorder(nn.Module):
    """Put in the place of a dropout layer: keeps what passes through it, unchanged."""

    def __call__(self, x):
        self.recorded = x
        return x


def look(prompt):
    """Draws how surprising each character is, what each head attends to, and what comes next."""
    if not prompt:
        raise UserError("the prompt is empty: there is nothing to look at")
    model, tokenizer = load_model()
    check_prompt(tokenizer, prompt)
    prompt = prompt[-model.config.ctx_len :]  # as much as the model can see
    tokens = tokenizer.encode(prompt)
    for block in model.blocks:
        block.mha.attn_dropout = Recorder()  # the attention weights pass through here
    logits = model(mx.array([tokens]))[0]  # (T, vocab_size)

    print(f"{'':18}{one_line(prompt)}")
    if len(tokens) > 1:
        losses = nn.losses.cross_entropy(logits[:-1], mx.array(tokens[1:]))  # (T - 1,)
        uniform = math.log(len(tokenizer.vocab))  # the loss of uniform guessing: a full bar
        print(f"{'surprise':18} {bars((losses / uniform).tolist())}")
    for i, block in enumerate(model.blocks):
        weights = block.mha.attn_dropout.recorded[0, :, -1]  # (n_heads, T), of the last position
        for head, row in enumerate(weights.tolist()):
            print(f"{f'block {i}, head {head}':18}{bars(row)}")
    probabilities = mx.softmax(logits[-1])  # (vocab_size,)
    for token in mx.argsort(-probabilities)[:8].tolist():
        p = probabilities[token].item()
        print(f"{f'next {tokenizer.vocab[token]!r}':18}{p:.2f} {'█' * round(50 * p)}")


# %% 13. The run


def load_data():
    """Reads input.txt: the tokenizer, the tokens to train on and to validate on, and a checksum.

    Both parts are NumPy arrays. Raises UserError if there is too little to learn from, or OSError.
    """
    try:
        text = load_text()
    except UnicodeDecodeError as error:
        raise UserError(f"input.txt is not UTF-8: {error}") from None
    if "\0" in text:
        raise UserError("input.txt has NUL characters in it: save it as UTF-8")
    tokenizer = CharTokenizer(text)
    if len(tokenizer.vocab) < 2:
        raise UserError("input.txt must have at least two different characters")
    train_tokens, val_tokens = split(np.array(tokenizer.encode(text), dtype=np.int32))
    if count_batches(train_tokens, ctx_len, batch_size) < 1 or len(val_tokens) <= ctx_len:
        raise UserError(f"input.txt, of {len(text):,} characters, is too short for batches of "
                        f"{batch_size} rows of {ctx_len}")
    return tokenizer, train_tokens, val_tokens, zlib.crc32(text.encode())


# Each stream is worked on by one core.
FIRST_CORE = mx.new_thread_local_stream(mx.cpu)
SECOND_CORE = mx.new_thread_local_stream(mx.cpu)


def two_core_loss(model, x, y):
    """loss_fn for machines without a GPU: each of two cores takes half of the rows."""
    half = len(x) // 2
    if 2 * half != len(x):
        return loss_fn(model, x, y)
    with mx.stream(FIRST_CORE):
        first = loss_fn(model, x[:half], y[:half])
    with mx.stream(SECOND_CORE):
        second = loss_fn(model, x[half:], y[half:])
        return (first + second) / 2


def choose_loss_fn():
    """loss_fn, or two_core_loss where there is no GPU. Call it before MLX computes anything."""
    if mx.default_device() != mx.cpu:
        return loss_fn
    # How far ahead MLX looks for work. With its own value, 20, the second core often has none.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "8")
    return two_core_loss


def join_processes(settings, checksum, history):
    """The number of this process, from 0, and how many there are: one, or those of mlx.launch.

    Raises UserError if they would not train the same model together.
    """
    world = mx.distributed.init()
    job = json.dumps([settings, checksum, history])
    ours = mx.array([zlib.crc32(job.encode())], dtype=mx.uint32)
    if mx.any(mx.distributed.all_gather(ours) != ours):
        raise UserError(f"the processes differ in train.py, input.txt, or {CHECKPOINT}")
    if batch_size % world.size() != 0:
        raise UserError(f"{world.size()} processes cannot share batch_size = {batch_size} rows")
    return world.rank(), world.size()


def print_passing(line):
    """Prints a line that the next print() overwrites. Does nothing unless in a terminal."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(line[:width].ljust(width), end="\r", flush=True)


def check_finite(loss, step):
    """Raises UserError if the training has diverged. loss is a float."""
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at step {step}: lower lr")


class Progress:
    """Reports from time to time how far the training is, and how long it will take."""

    def __init__(self, steps_done, total_steps):
        self.step = steps_done
        self.total_steps = total_steps
        self.pause = 1 if sys.stdout.isatty() else 15  # seconds between two reports
        self.started = None

    def update(self, loss):
        """Counts a step. If it is time to, checks and reports its loss, a scalar array."""
        self.step += 1
        if self.started is None:  # the first step compiles, so the clock starts after it
            mx.eval(loss)
            self.first_step = self.step
            self.started = self.last_report = time.perf_counter()
        now = time.perf_counter()
        if now - self.last_report < self.pause:
            return
        self.last_report = now
        check_finite(loss.item(), self.step)  # .item() waits for the GPU, so not in every step
        seconds_per_step = (now - self.started) / (self.step - self.first_step)
        minutes = seconds_per_step * (self.total_steps - self.step) / 60
        line = (f"step {self.step:,} of {self.total_steps:,}, loss {loss.item():.2f}, "
                f"{minutes:.1f} min left")
        print_passing(line)
        if not sys.stdout.isatty():
            print(line, flush=True)


def count_parameters(model):
    """How many numbers training can change."""
    return sum(weight.size for _, weight in tree_flatten(model.parameters()))


def introduce(model, tokenizer, settings):
    """Prints what will be trained, with which settings, so that a misspelt one is noticed."""
    values = [f"{name} {value}" for name, value in settings.items()]
    V = len(tokenizer.vocab)
    print(f"The {'small' if small else 'default'} model: {count_parameters(model):,} parameters")
    print(", ".join(values[:7]))
    print(", ".join(values[7:]))
    print(f"Uniform guessing among {V} characters: ln {V} = {math.log(V):.4f}")


def report(title, train_loss, val_loss, model, tokenizer):
    """Prints the losses, and a line of what the model writes now."""
    print(f"{title} | train = {train_loss:.4f} | val = {val_loss:.4f} | "
          f"perplexity {math.exp(min(val_loss, 99)):.1f}")
    prompt = first_char(tokenizer)  # any other text whose characters are in input.txt will do
    text = "".join(continue_text(model, tokenizer, prompt, 70))
    print(f"{'':10}{one_line(text)}", flush=True)


def best_loss(history):
    """The lowest validation loss of a run."""
    return min(epoch["val"] for epoch in history)


def save_epoch(model, optimizer, tokenizer, notes):
    """Saves the model, if it is the best so far, and then the checkpoint.

    If the run is killed between the two, --resume repeats the epoch with the same result.
    """
    history = notes["history"]
    if len(history) == 1 and os.path.exists(MODEL):
        with replacing(FORMER) as unfinished:
            shutil.copyfile(MODEL, unfinished)
    if history[-1]["val"] == best_loss(history):
        save_model(MODEL, model, tokenizer)
    save(CHECKPOINT, {"model": model.parameters(), "optimizer": optimizer.state}, notes)


def resume_run(model, optimizer, settings, checksum):
    """Gives model and optimizer their state in CHECKPOINT. Returns the history of that run.

    Raises UserError if that run is a different one, or finished.
    """
    saved, notes = load(CHECKPOINT)
    try:
        history, old_settings, old_checksum = notes["history"], notes["settings"], notes["checksum"]
    except KeyError:
        raise UserError(f"{CHECKPOINT} is not from this train.py") from None
    if old_checksum != checksum:
        raise UserError(f"{CHECKPOINT} is from a run on a different input.txt")
    different = changes(old_settings, {n: settings[n] for n in settings if n not in MAY_CHANGE})
    if different:
        raise UserError(f"{CHECKPOINT} is from a different run: {different}")
    if len(history) >= num_epochs:
        raise UserError("that run is finished: raise num_epochs to train on")
    if old_settings["num_epochs"] != num_epochs:
        print(f"num_epochs was {old_settings['num_epochs']}: from now on, the learning rate "
              f"follows the schedule for {num_epochs}")
    set_weights(model, saved["model"])
    optimizer.state = saved["optimizer"]
    return history


def add_to_diary(run):
    """Adds a finished run to the diary. Returns how it compares with the last one on this text."""
    lines = []
    if os.path.exists(RUNS):
        lines = Path(RUNS).read_text(encoding="utf-8", errors="replace").splitlines()
    lines.append(json.dumps(run))
    with replacing(RUNS) as unfinished:
        Path(unfinished).write_text("\n".join(lines) + "\n", encoding="utf-8")

    comparison = ""
    for line in lines[:-1]:
        try:
            old = json.loads(line)
            if old["checksum"] == run["checksum"]:
                changed = changes(old["settings"], run["settings"]) or "no setting"
                comparison = (f"Since the last run: {changed}. Best validation loss "
                              f"{old['best_val']:.4f} to {run['best_val']:.4f}")
        except (ValueError, TypeError, KeyError):
            continue  # a damaged line
    return comparison


def finish(history, settings, checksum):
    """Ends a run: the diary, a text by the best weights, and how the run compares."""
    model, tokenizer = load_model()
    comparison = add_to_diary({
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        "checksum": checksum,
        "parameters": count_parameters(model),
        "minutes": round(sum(epoch["minutes"] for epoch in history), 1),
        "best_val": best_loss(history),
        "settings": settings,
    })
    text = "".join(continue_text(model, tokenizer, first_char(tokenizer), max_new_tokens))
    with replacing(COMPLETIONS) as unfinished:
        Path(unfinished).write_text(text, encoding="utf-8")
    print(f"\n{text}\n")
    print(f"The best weights are in {MODEL}, this text is in {COMPLETIONS}, and {RUNS} has a new "
          f"line.\n{comparison}")


def train(resume=False):
    """Trains a model on input.txt, saves it after each epoch, and lets it write at the end.

    With resume=True, it goes on after the last saved epoch. Raises UserError.
    """
    fast_loss_fn = choose_loss_fn()
    settings = check_settings()
    tokenizer, train_tokens, val_tokens, checksum = load_data()
    steps_per_epoch = count_batches(train_tokens, ctx_len, batch_size)
    total_steps = num_epochs * steps_per_epoch

    mx.random.seed(seed)
    model = GPT(GPTConfig(len(tokenizer.vocab), ctx_len, n_emb, n_heads, n_layers, dropout))
    optimizer = make_optimizer(total_steps)
    optimizer.init(model.trainable_parameters())
    history = []  # for each epoch, its losses and minutes
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
        mx.random.seed(int(rng.integers(2**31)) + rank)
        model.train()  # dropout on
        for x, y in get_batches(train_tokens, ctx_len, batch_size, rng):
            loss = step(x[rank::processes], y[rank::processes])  # this process's share of the rows
            mx.async_eval(loss, model.state, optimizer.state)  # start computing, and do not wait
            progress.update(loss)
            # To save every 500 steps: if progress.step % 500 == 0: save_model("my.safetensors",
            # model, tokenizer). --resume cannot go on from there, only from the end of an epoch.

        print_passing("Measuring the losses")
        train_loss = evaluate(model, train_tokens[: len(val_tokens)], fast_loss_fn)
        val_loss = evaluate(model, val_tokens, fast_loss_fn)
        check_finite(val_loss, progress.step)
        minutes = (time.perf_counter() - started) / 60
        history.append({"train": train_loss, "val": val_loss, "minutes": minutes})
        if rank == 0:
            notes = {"settings": settings, "checksum": checksum, "history": history}
            save_epoch(model, optimizer, tokenizer, notes)
        report(f"Epoch {epoch:2}", train_loss, val_loss, model, tokenizer)

    if rank == 0:
        finish(history, settings, checksum)


# %% 14. The command line


def main():
    """Does what the command line says. Errors that the user can fix are shown in one line."""
    parser = argparse.ArgumentParser(description="Train a small GPT-2 on input.txt.")
    parser.add_argument("--sample", metavar="TEXT", nargs="?", const="",
                        help="continue TEXT with the trained model")
    parser.add_argument("--look", metavar="TEXT",
                        help="show what the trained model attends to and what it predicts next")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted run")
    arguments = parser.parse_args()

    sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    if mx.distributed.init().rank() > 0:  # of several processes, only the first prints
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open to the end)
    try:
        if arguments.sample is not None:
            type_out(arguments.sample)
        elif arguments.look is not None:
            look(arguments.look)
        else:
            train(arguments.resume)
    except KeyboardInterrupt:
        sys.exit("\ntrain.py: stopped. python train.py --resume goes on after the last saved epoch")
    except BrokenPipeError:  # the reader of a pipe has left, as in: python train.py --sample | head
        sys.stdout = None  # or Python would try to write to it once more
        sys.exit(1)
    except (UserError, OSError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    if "ipykernel" in sys.modules:  # a notebook, which has no command line
        train()
    else:
        main()
