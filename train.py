"""GPT-2 from scratch in MLX: a tutorial in one file.

    python train.py                     train on input.txt, then write some text
    python train.py --sample "To be"    continue a prompt with the trained model
    python train.py --look "To be"      show what it attends to and what it predicts next
    python train.py --resume            go on with an interrupted run

Show GPT-2 the beginning of a text, and it guesses what comes next. That is all it can do. But add
the guess to the text and let it guess again, and again, and it writes. Ours guesses one character
at a time. On a computer without a GPU (but with two idle cores), we train a small model. Given
nothing but a newline (⏎), it writes:

    untrained            uQv$?Mz &zsLMx3led,qOyxSH'⏎WUkApi:ikizTyBrFNW'.kJXXZbQviZicmMrM
    after 20 seconds     an dhe sand lith mulup, che ke o donow mup ik bre the ka  there!
    after four minutes   word not call to spamer, and he sleam, swith a strace keep the Ling.

Four minutes ago it could not tell a vowel from a dollar sign. A Mac's GPU gets a larger model,
which takes longer, learns to spell, and even keeps to the meter now and then.

What happens in those four minutes is not magic, and you can read all of it in this file. GPT stands
for generative pre-trained transformer. A *transformer* is one kind of *neural network*, that is, a
function with a great many adjustable numbers. Nearly all of them start out random, and it shows in
what the untrained model writes. We will build this function piece by piece and have it guess its
way through a real text. After every few hundred guesses (or, in a larger model, every few
thousand), we nudge each of its numbers in the direction that would have made those guesses better.
Our library is MLX, Apple's own. It works much like NumPy, but it can do two more things: it can use
the graphics processor (GPU) of a Mac, and it can find those directions for us, all at once.

     1. Settings      5. Loss and learning      9. Generating text       13. The command line
     2. Data          6. Attention             10. Training
     3. Tokenizer     7. MLP and block         11. Looking inside
     4. Batches       8. GPT                   12. The parts of a run

Sections 1 to 11 are the lesson. It takes an afternoon, and needs some Python and high school math,
no more. Start a run, and read from the top while it works. Then change something, run it again, and
compare the validation loss, which says how badly the model predicts text that it has never seen.
Pure guessing gets 4.17, and lower is better. On the shipped text, the small model gets 1.53, and
the default model 1.25. Try `n_heads = 1` first, or your own text in input.txt. The README has more
experiments, and the steps that lead from GPT-2 to the models of today.

The examples after >>> are tests. To run them: python -m doctest train.py
"""

# For uv, a tool that installs what a script needs:
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26.4", "mlx>=0.32.4", "mlx[cpu]>=0.32.4; sys_platform == 'linux'",
#                 "mlx-cpu>=0.32.4; sys_platform == 'win32'"]
# ///

# %% Imports

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
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

if not hasattr(mx.array, "mT"):  # the newest thing that this file uses
    raise ImportError("this MLX is too old: pip install --upgrade -r requirements.txt")

# %% 1. Settings
#
# Which numbers do we choose, and which does the model find for itself? Ours are called
# *hyperparameters*, and those that training finds are the *parameters*, or weights. On a first
# reading, skip this page, since each setting is explained where it is used. Come back to it when
# you want to play.
#
# Where a line has two values, the first is for the small model, which a computer without a GPU can
# train in minutes, and the second for the default model, which is what a GPU gets.

small = mx.default_device() == mx.cpu  # or True, to get the small model on a GPU as well

ctx_len = 48 if small else 128  # context length: how many characters the model can see
n_emb = 56 if small else 128  # embedding size: how many numbers stand for one character
n_heads = 7 if small else 4  # attention heads per block; n_emb must be a multiple of this number
n_layers = 1 if small else 3  # blocks
dropout = 0.0  # fraction of numbers zeroed in training; raise it if the model overfits
num_epochs = 3 if small else 20  # passes over the training set
batch_size = 8 if small else 32  # rows of text per step
lr = 1e-2 if small else 3e-3  # peak learning rate; lower it if the loss jumps around

warmup_steps = 100  # steps until the learning rate peaks; use fewer if a run is short
weight_decay = 0.1 if small else 0.5  # how strongly weights are pulled toward 0
beta1 = 0.9  # decay rate of AdamW's average of the gradient
beta2 = 0.99  # decay rate of AdamW's average of the squared gradient
max_norm = 1.0  # a gradient longer than this is scaled down to it
seed = 0  # where the random numbers start: another seed, another run

max_new_tokens = 1000  # length of the generated text, in characters
temperature = 0.8  # 0: always the most likely character; 1: unchanged; above 1: bolder
top_k = 40  # choose among the k most likely characters; try 5, or None for all of them

# The names of the settings, so that they can be printed, logged, and compared with the settings of
# earlier runs. A setting that you add above joins this list by itself if its name begins with a
# lowercase letter and its value is a number (0 or above), a switch (True or False), or a string.
SETTINGS = [name for name, value in globals().items()
            if isinstance(value, (int, float, str)) and name[0].islower()]

# %% 2. Data
#
# All our data is one text file. The one that comes with this program holds eight plays in the
# manner of Shakespeare, written for the purpose. (Its first line is borrowed from the file known as
# Tiny Shakespeare, but the rest is a different text, so losses on the two cannot be compared.)
#
# How will we know whether the model has learned something about the language? If it has read a line
# a thousand times, being able to recite it proves nothing. So it learns from only the first
# nine-tenths of the text, the *training set*. The last tenth, the *validation set*, is held out,
# and there we test the model. A model that does well on what it has read, and badly on what it has
# not, has merely memorized, which is called *overfitting*.


def load_text(path="input.txt"):
    """The text of a UTF-8 file. Raises OSError or UnicodeDecodeError if it cannot be read."""
    path = Path(path).resolve()  # the whole path, so that an error says where we looked
    return path.read_text(encoding="utf-8-sig")  # -sig: skip the byte order mark, if any


def split(text):
    """The first nine-tenths of a text, and the last tenth. Works on arrays as well.

    >>> split("abcdefghij")
    ('abcdefghi', 'j')
    """
    boundary = len(text) * 9 // 10
    return text[:boundary], text[boundary:]


# %% 3. Tokenizer
#
# A neural network computes with numbers, so the text must become numbers before anything else can
# happen. How? We cut it into *tokens*, here single characters. The list of all the different tokens
# is the *vocabulary*, and the place of a token in this list is its *token ID*. Like most code, ours
# simply calls this number the token.
#
# Why characters, and not words? GPT-2 takes something in between. Its vocabulary, found by
# *byte-pair encoding*, has 50,257 tokens, from single bytes to whole words, and an English text
# needs far fewer of them than it has characters. "What is the court", whose last word we will
# complete many times in this file, is four tokens there, and 17 here. But to learn what each of
# 50,257 tokens means takes more text than we have. Characters are simpler, and what the numbers
# stand for makes no difference to the model.


def build_vocab(text):
    """The vocabulary of a text: a sorted list of strings, its different tokens."""
    return sorted(set(text))


class CharTokenizer:
    """Translates between text and tokens.

    >>> tokenizer = CharTokenizer(build_vocab("hello world"))
    >>> tokenizer.vocab
    [' ', 'd', 'e', 'h', 'l', 'o', 'r', 'w']
    >>> tokenizer.encode("hold")
    [3, 5, 4, 1]
    >>> tokenizer.decode([3, 5, 4, 1])
    'hold'
    """

    def __init__(self, vocab):
        self.vocab = vocab
        self.token_of = {char: token for token, char in enumerate(vocab)}

    def encode(self, text):
        """The tokens of a string, a list of ints. Raises KeyError for a character not in vocab."""
        return [self.token_of[char] for char in text]

    def decode(self, tokens):
        """The string that a list of tokens stands for."""
        return "".join(self.vocab[token] for token in tokens)


# %% 4. Batches
#
# A *language model* sees the text so far and predicts the next token. To learn, it needs questions
# with answers. Who writes down the answers, a million of them? Nobody has to. The text is full of
# them already, because wherever you stop reading, the next character is right there. This is called
# *self-supervised learning*. The shipped text begins with "First Citizen:". Here are its first
# T = 8 tokens, x, and the right answers, the *targets* y, which are the same text one place further
# on. (_ is a space.)
#
#     x = 18 47 56 57 58  1 15 47        F i r s t _ C i
#     y = 47 56 57 58  1 15 47 58        i r s t _ C i t
#
# This one row holds eight questions. What follows "F"? What follows "Fi"? And so on, up to "First
# Ci", which is followed by "t". The model answers all of them at once, one at each position of the
# row, where it sees the characters up to that position and none of those after it.
#
# The hardware likes to work on many numbers at a time, so we give the model B rows at once, a
# *batch* (or mini-batch). The rows know nothing of one another. A batch is an array, a grid of
# numbers, whose shape says how long it is along each of its axes: (B, T) means B rows of T numbers.
# In an index, a colon takes everything along an axis: a[:, 0] is the first column.
#
# A whole pass over the training set is an *epoch*. At the start of a row, the model has little to
# go by: the second character must be predicted from the first alone, because whatever came before
# it belongs to another row. If every epoch cut the text at the same places, this would always
# befall the same characters. So each epoch begins at one of the first T tokens, picked at random,
# and takes the rows in random order.
#
# NumPy (np) cuts the text, and MLX (mx) does the computing.


def get_batches(tokens, ctx_len, batch_size, rng=None):
    """Yields (x, y), both (B, T) with T = ctx_len, where y holds the token after each one in x.

    tokens is a NumPy array of ints. For training, pass rng, a NumPy random generator: the first row
    begins at a random place, the order is random, and what does not fill a batch is left out. For
    measuring, omit rng: all rows come in order, the last batch may be smaller, and only tokens at
    the end that do not fill a row are left out.

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
    """How many batches get_batches() makes with an rng. The learning rate will depend on it.

    >>> tokens, rng = np.arange(100), np.random.default_rng(0)
    >>> len(list(get_batches(tokens, 4, 3, rng))), count_batches(tokens, 4, 3)
    (7, 7)
    """
    rows = (len(tokens) - 1) // ctx_len  # - 1, since the last row needs one more token as a target
    return (rows - 1) // batch_size  # - 1 for the row that is dropped


# %% 5. Loss and learning
#
# Now we have questions with answers. Before we build something that answers them, let us agree on
# how to judge it. At each position the model gives each of the V tokens of the vocabulary a number,
# its *logit*. The higher it is, the more likely that token is to come next. *Softmax* turns the
# logits s_1 to s_V into probabilities, which are positive and sum to 1:
#
#     p_i = exp(s_i) / (exp(s_1) + ... + exp(s_V))        (2, 1, 0) -> (0.67, 0.24, 0.09)
#
# The exponential makes everything positive, and it turns differences of logits into ratios of
# probabilities: p_i / p_j = exp(s_i - s_j). So adding the same number to all logits changes
# nothing. Keep this in mind; it will come back.
#
# Then the text reveals which token really came next. Let p be the probability that the model gave
# it. The *loss* is -ln p, which is 0 if the model was certain of that token, and grows with the
# model's surprise. You will also meet it as the *negative log-likelihood*.
#
#     p        1       0.22     1/65      0.001
#     loss     0       1.5      4.17      6.9
#
# Why a logarithm? Because the probability of a whole text is a product. If the model gives "F" 1/2,
# and then "i" 1/4, it gives "Fi" 1/8, and a whole play gets next to nothing. A logarithm turns
# products into sums, so the losses of single tokens can simply be added up or averaged. The mean is
# the *cross-entropy*, in *nats* per token (nats, because of the natural logarithm). If you prefer a
# number that you can picture, take exp(loss), the *perplexity*. At a loss of 1.5, the model is as
# unsure as if it had to choose among exp(1.5) = 4.5 equally likely characters.
#
# And what is a good loss? The shipped text has 65 different characters, and rolling a die with 65
# sides gets ln 65 = 4.17. The classic rival is an *n-gram model*, which has no neurons at all. It
# counts, in the training set, how often each character followed each string of n - 1 characters. If
# "th" was followed by "e" 60 times out of 100, then "e" gets about 0.6 after "th". Such a model is
# hard to beat, but it has a hole. A character that never followed "th" would get p = 0 and an
# infinite loss. So smoothing (there are many ways; ours is modified Kneser-Ney) takes a little
# probability from the characters that were seen, and shares it among all, in the proportions that a
# shorter string suggests. On the shipped text:
#
#     n        1       2       3       4       5       6       7
#     loss     3.24    2.36    1.83    1.51    1.38    1.34    1.33
#
# These are the numbers to beat. The small model will beat n = 3 and come close to n = 4; the
# default model will beat them all.


def loss_fn(model, x, y):
    """The mean cross-entropy, a scalar array, in nats per token. x and y are (B, T)."""
    logits = model(x)  # (B, T, V)
    return nn.losses.cross_entropy(logits, y, reduction="mean")  # softmax, -ln p, mean


# To learn is to change the parameters so that the loss falls. How do we know which way to change
# them? Let us find out with a model so small that we can watch every move. It has one parameter, w,
# and its alphabet is "a" and "b". In its language, three letters out of four are "a", and the rest
# are "b". The logit of "a" is w, and that of "b" is always 0. As exp(0) = 1, softmax gives "a" the
# probability p = exp(w) / (exp(w) + 1), and "b" gets 1 - p. So in three cases out of four the loss
# is -ln p, in the others it is -ln(1 - p), and this is its mean:


def toy_loss(w):
    """The loss, a scalar array, of a model with one parameter.

    Should w go up or down? Nudge it, and see what the loss does. (.item() is the number in an
    array.)

    >>> change = toy_loss(mx.array(0.001)) - toy_loss(mx.array(0.0))
    >>> print(f"{change.item() / 0.001:.3f}")
    -0.250

    Around w = 0, the loss changes -0.25 times as much as w does. This is the slope of the loss at
    that point, its *derivative*. As it is negative, the loss falls when w grows, so w should grow.
    MLX finds the slope without a nudge:

    >>> slope = mx.grad(toy_loss)
    >>> print(f"{slope(mx.array(0.0)).item():.3f}")
    -0.250

    *Gradient descent* moves w against the slope, finds the slope at the new place, and moves again.
    Each move is the slope times a number of our choice, the *learning rate*, here 2.

    >>> w = mx.array(0.0)
    >>> for step in range(4):
    ...     print(f"w = {w.item():.3f}, slope = {slope(w).item():.3f}")
    ...     w = w - 2 * slope(w)
    w = 0.000, slope = -0.250
    w = 0.500, slope = -0.128
    w = 0.755, slope = -0.070
    w = 0.895, slope = -0.040
    """
    p = mx.exp(w) / (mx.exp(w) + 1)  # the probability of "a"
    return -(3 / 4 * mx.log(p) + 1 / 4 * mx.log(1 - p))  # mx.log is ln


# It goes on like this, in ever smaller steps:
#
#     w          0        0.5      0.755    0.895    ...   1.099
#     p          0.5      0.622    0.680    0.710    ...   0.75
#     loss       0.6931   0.5991   0.5740   0.5664   ...   0.5623
#
# Look where w settles: where p is 3/4, which is exactly how often an "a" comes up. (The slope turns
# out to be p - 3/4. At that point it is 0, and nothing moves w any further.) Nobody told the model
# to count letters. It counted them because that is what makes the loss small. Yet the loss does not
# reach 0, because the next letter is partly chance, as it is in English. And if we are impatient?
# With a learning rate of 20, the first step overshoots to w = 5, where the loss is 1.26, worse than
# at the start.
#
# A real model has a great many parameters, and a slope, or partial derivative, for each. All the
# slopes together, in one long list, are the *gradient*. If we nudged one parameter at a time, a
# single training step would mean running the default model some 620,000 times. *Backpropagation*
# gets the whole gradient for the price of about three runs: one forward, and one backward that
# costs as much as two. It rests on the *chain rule*: if one number depends on another, and that on
# a third, the slopes multiply.
#
#         slope 3       slope -2
#     w ----------> z ----------> loss          slope of the loss with respect to w: 3 * -2 = -6
#                   ^
#     u ------------+                           slope of the loss with respect to u: 5 * -2 = -10
#         slope 5
#
# If z grows 3 times as fast as w, and the loss falls twice as fast as z grows, then the loss falls
# 6 times as fast as w grows. Because every operation knows its own slope (that of x * x is 2 * x),
# the program can run the model once to find the loss (the *forward pass*), and then walk back from
# the loss, multiplying slopes as it goes (the *backward pass*). If this looks too simple to be the
# whole secret, look again at the -2. It is found once, and serves both w and u, and whatever else z
# depends on, so one walk back serves all parameters. And where a number is used in several places,
# its slopes add up: 3 * w + 2 * w has slope 5.

# %% 6. Attention
#
# From here on we build the model, from the inside out. This is where we are going:
#
#     tokens                                    (B, T)
#       |   two tables turn each token and its
#       |   position into a vector              (B, T, n_emb)      section 8
#       v
#     block: attention, then an MLP             (B, T, n_emb)      sections 6 and 7
#       |   ... n_layers of these, each working on the result of the one before
#       v
#     block                                     (B, T, n_emb)
#       |   the table of tokens, once more,
#       |   turns each vector into logits       (B, T, V)          section 8
#       v
#     logits
#
# So inside the model each position has a *vector*, a list of n_emb numbers, which at first
# describes no more than its own character and its own place. Only attention ever moves anything
# from one position to another. All the rest works on each vector by itself.
#
# The first transformer was made for translation, and had one half that reads and one that writes.
# GPT is the half that writes, on its own (decoder-only). Its sizes are kept in one object:


@dataclass  # writes __init__ for us
class GPTConfig:
    """The sizes of a model, and its dropout."""

    vocab_size: int
    ctx_len: int  # elsewhere: context window, or block size
    n_emb: int  # d_model
    n_heads: int
    n_layers: int
    dropout: float


# You have read "What is the cou", and you want to guess what comes next. The "u" alone says little.
# Knowing that it follows "co" helps a lot. How can a position get at what stands before it? The
# crudest way is to average: replace each vector by the mean of itself and all earlier ones. Here
# are the shares that go into each mean, the *attention weights*, for three positions. (They are
# called weights, but they are not parameters.) Each row belongs to a position that asks, and each
# column to one that answers:
#
#     1    0    0          = softmax(0, -inf, -inf)
#     1/2  1/2  0          = softmax(0,    0, -inf)
#     1/3  1/3  1/3        = softmax(0,    0,    0)
#
# The zeros in the upper right corner are there for a reason. The next position holds the very
# answer that we ask for. A model that saw it would learn to copy, and nothing else. And once it had
# to write, there would be no next position to copy from. Now the softmax beside the table makes
# sense. It turns equal numbers into equal weights, and -inf into exactly 0, because exp(-inf) = 0.
# The places that get -inf form the *causal mask*:


def causal_mask(T, S):
    """(T, S) booleans: whether position j comes after position i, and must be hidden from it.

    T positions ask, and S positions answer. Until section 9 they are the same positions, so T = S.
    In section 9, those that ask are the last T of the S.

    >>> print(np.array(causal_mask(3, 3)))
    [[False  True  True]
     [False False  True]
     [False False False]]
    """
    i = mx.arange(S - T, S)[:, None]  # (T, 1): None adds an axis, so this is a column
    j = mx.arange(S)  # (S,): a row
    return j > i  # (T, S): both are stretched into a table, which is called *broadcasting*


# This is the page to read twice, so take it slowly. An average treats all alike, so the "u" would
# hear the "W" far away as loudly as the "o" next door. We want each position to choose whom it
# listens to. So in place of the zeros inside softmax(...), we put *scores*. If position i gives
# position j a high score, softmax gives j much of the weight, and i *attends to* j.
#
# What should the score be? Something that can be computed from the two vectors, and that learning
# can shape. A simple measure of how well two vectors agree is their *dot product*: multiply entry
# by entry, and add up.
#
#     (1, 2) and (3, 4):       1 * 3 + 2 * 4  =  11
#     (1, 2) and (-3, -4):    -1 * 3 - 2 * 4  =  -11
#     (1, 2) and (2, -1):      1 * 2 - 2 * 1  =  0
#
# It is large if two long vectors point the same way. But should the score simply be the dot product
# of the two vectors? No, for then each position would mostly find those like itself, and any two
# would have the same score for each other. And what "u" asks for ("which letters came just
# before?") is not what it has to offer ("here is a vowel"). What it gives to those who find it may
# be something else again. So each position gets three vectors:
#
#     *query*    what I am looking for
#     *key*      what others can find me by
#     *value*    what I pass on to those who find me
#
# All three are lists of head_size numbers (8 of them in our small model; we will soon see why).
# They are made from the vector of the position, each by its own *matrix* of parameters. A matrix is
# a table of numbers. Multiply a vector x by a matrix M, x @ M, and you get a new vector: the dot
# products of x with the columns of M.
#
#     x = (1, 2)      M = 3  0      x @ M = (1 * 3 + 2 * 4, 1 * 0 + 2 * 5) = (11, 10)
#                         4  5
#
# So every number in x @ M measures something about x, and learning finds out what is worth
# measuring. If x has many rows, x @ M does this to each of them.
#
# The score of position i for position j is the dot product of i's query and j's key. To get all
# scores at once, we put all queries into the rows of a table q, and all keys into those of a table
# k. Then we need the dot product of each row of q with each row of k. Because a matrix product goes
# by columns, k is first transposed: k.mT is k with its rows turned into columns, and q @ k.mT is
# the table of all scores.


def attention_weights(q, k):
    """softmax(q @ k.mT / sqrt(head_size)), with the future masked.

    q is (..., T, head_size), k is (..., S, head_size), and the result is (..., T, S), with a row
    for each query and a column for each key. The dots stand for any axes before these. Elsewhere,
    head_size is called d_k, and this function, together with the product weights @ v that follows
    it, is *scaled dot-product attention*.

    Here are three positions, whose queries and keys have two numbers each. Before softmax, their
    scores are divided by sqrt(2); we will come to that.

    >>> q = mx.array([[1.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    >>> k = mx.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> print(np.array(q @ k.mT))
    [[1. 0. 1.]
     [3. 0. 3.]
     [0. 3. 3.]]
    >>> weights = attention_weights(q, k)
    >>> print(np.array(weights).round(2))
    [[1.   0.   0.  ]
     [0.89 0.11 0.  ]
     [0.06 0.47 0.47]]

    The first position can attend only to itself. The query of the second, (3, 0), agrees with the
    first key. (It agrees with the third just as well, but that one is in the future.) The third
    attends to the second and to itself. Now everyone collects values in these proportions, which
    is a matrix product once more: in each row, the weights times the values they belong to, added
    up. In the second row, for instance, 0.89 * (10, 0) + 0.11 * (0, 10) = (8.9, 1.1).

    >>> v = mx.array([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]])
    >>> print(np.array(weights @ v).round(1))
    [[10.   0. ]
     [ 8.9  1.1]
     [ 2.9  7.1]]
    """
    T, S = q.shape[-2], k.shape[-2]
    scores = q @ k.mT  # (..., T, S)
    scores = scores / math.sqrt(q.shape[-1])
    scores = mx.where(causal_mask(T, S), -mx.inf, scores)  # -inf where the mask is True
    return mx.softmax(scores, axis=-1)  # (..., T, S): each row sums to 1


# One line needs defending. Why divide by sqrt(head_size)? The more numbers a query and a key have,
# the larger their dot product tends to be, and large scores bring learning to a halt.
#
# Suppose that all the numbers in queries and keys are random and independent, with mean 0 and
# variance 1. (The variance is then the mean of their squares, and its square root, the *standard
# deviation*, is their typical size.) Then each product has variance 1 as well, and because
# variances of independent numbers add up, the sum of head_size products has variance head_size. (If
# you have never met these two facts, a few lines of NumPy will confirm them.) Its typical size is
# the root of that, sqrt(head_size). Now watch what this does to softmax if one score is that large
# and another is 0:
#
#     head_size              1        8        32       128
#     sqrt(head_size)        1        2.83     5.66     11.31
#     softmax(that, 0)[0]    0.731    0.944    0.997    1.000
#
# The larger the head, the closer the winner comes to taking everything: softmax saturates. Out at
# 1.000, nudging a score changes next to nothing, so there is hardly a slope to follow, and queries
# and keys stop learning. If we divide by the root, the winner gets 0.731, whatever the size. Does a
# model as small as ours need this division? Make a guess, and then see the experiment in the
# README.
#
# What we have now is one attention *head*. At each position it forms one average, so it can look
# for one thing at a time: the letter before this one, perhaps, or where the word began, or who is
# speaking. A good guess needs all three. So we let several heads, n_heads of them, work side by
# side. Each has its own queries, keys, and values, of head_size = n_emb / n_heads numbers (in the
# small model 56 / 7 = 8). Then we join what they find into n_emb numbers again. In section 11 we
# will see what the heads of a trained model really look for.
#
# In MLX, each kind of part is a class derived from nn.Module, and each part is an object of that
# class. Calling the object runs its __call__ method. One thing to know before you write a class of
# your own: a Module treats every array that you assign to an attribute as a parameter, and trains
# it. If it is a constant, such as a mask or a table of sines, let its name begin with an
# underscore.


class MultiHeadAttention(nn.Module):
    """Causal multi-head self-attention: (B, T, n_emb) to (B, T, n_emb).

    It is called *self*-attention because queries, keys, and values all come from the same text. The
    query matrices of all heads stand side by side in one large matrix, which computes all queries
    at once. The queries are then split by head, and so are keys and values. The @ operator works on
    the last two axes of an array, and repeats this for all axes before them, so heads must come
    before positions:

        (B, n_heads, T, head_size) @ (B, n_heads, head_size, T) = (B, n_heads, T, T)

    At the end, c_proj mixes what the heads have found. Without it, each head could only ever change
    its own part of the vector.

    MLX offers scores, mask, softmax, and average as one fast function,
    mx.fast.scaled_dot_product_attention. But it has no dropout and keeps the weights to itself, and
    they are what we came to see.
    """

    def __init__(self, config):
        super().__init__()
        self.head_size = config.n_emb // config.n_heads
        # nn.Linear(n, m) turns vectors of n numbers into vectors of m numbers: it multiplies by a
        # matrix and adds m more parameters, the *biases*.
        self.q_proj = nn.Linear(config.n_emb, config.n_emb)
        self.k_proj = nn.Linear(config.n_emb, config.n_emb)
        self.v_proj = nn.Linear(config.n_emb, config.n_emb)
        self.c_proj = nn.Linear(config.n_emb, config.n_emb)  # mixes what the heads have found
        # *Dropout* sets a fraction of its input, chosen at random, to 0, and scales up the rest to
        # make up for it. It sounds like sabotage, and it is. But since no part can now rely on any
        # single number, memorizing becomes hard. Such measures against overfitting are called
        # *regularization*. (On Tiny Shakespeare, our default model did just as well with more
        # weight decay and no dropout, so in the settings above dropout is 0.) Dropout acts only in
        # training: model.train() turns it on, and model.eval() turns it off.
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)  # residual: see section 7

    def split_heads(self, x):
        """(B, T, n_emb) to (B, n_heads, T, head_size).

        The reshape cuts each vector into pieces, one for each head. The transpose then sorts them
        by head. Why not reshape to the final shape at once? Because the shape would be right, and
        the numbers in it wrong. Here are four positions with two numbers each, for two heads of
        size 1. Each printed row is a head.

        >>> x = np.arange(8).reshape(4, 2)  # the positions have (0, 1), (2, 3), (4, 5), (6, 7)
        >>> print(x.reshape(4, 2, 1).transpose(1, 0, 2)[:, :, 0])  # right: a part of each position
        [[0 2 4 6]
         [1 3 5 7]]
        >>> print(x.reshape(2, 4, 1)[:, :, 0])  # wrong: all of two positions
        [[0 1 2 3]
         [4 5 6 7]]
        """
        B, T, _ = x.shape
        x = x.reshape(B, T, -1, self.head_size)  # (B, T, n_heads, head_size); -1: whatever fits
        return x.transpose(0, 2, 1, 3)  # (B, n_heads, T, head_size)

    def __call__(self, x, cache=None):
        q = self.split_heads(self.q_proj(x))  # (B, n_heads, T, head_size)
        k = self.split_heads(self.k_proj(x))  # (B, n_heads, T, head_size)
        v = self.split_heads(self.v_proj(x))  # (B, n_heads, T, head_size)
        if cache is not None:  # only in section 9: adds keys and values of earlier positions
            k, v = cache.update_and_fetch(k, v)  # (B, n_heads, S, head_size)
        weights = attention_weights(q, k)  # (B, n_heads, T, S)
        out = self.attn_dropout(weights) @ v  # (B, n_heads, T, head_size)
        out = out.transpose(0, 2, 1, 3)  # (B, T, n_heads, head_size)
        out = out.reshape(x.shape)  # (B, T, n_emb): the heads side by side
        return self.resid_dropout(self.c_proj(out))  # (B, T, n_emb)


# A curiosity: the bias of k_proj has no effect whatever. The dot product of q with k + b is that of
# q with k, plus that of q with b. The second one is the same for all scores in a row, and softmax
# does not notice. GPT-2 has this bias anyway. Even the smallest GPT-2 carries 9,216 of these
# numbers, trained with care and good for nothing.

# %% 7. MLP and block
#
# Attention lets the positions talk to one another, but it can only average what they say. At the
# end of "What is the cou", the "u" has heard of a "c" and an "o" and a space before them. It takes
# more to conclude that a word has begun with "cou", so that an "l" or an "n" or an "r" is due. That
# is the job of the *MLP* (multilayer perceptron, also called a feed-forward network). It works on
# each position by itself. It has two *linear layers* (each a matrix and its biases, as in
# nn.Linear), and between them lie 4 * n_emb numbers, which are called the *hidden layer*.
#
# A linear layer can only add up evidence. It cannot say, "A c counts only if a space comes before
# it." Nor could two of them alone, because (x @ M) @ N is x @ (M @ N), and M @ N is just another
# matrix. Something whose graph is not a straight line must go between them: a *nonlinearity*, or
# activation function. The simplest is *ReLU*, max(0, x). Let c be 1 if there is a c, and s be 1 if
# a space comes before it, and let each be 0 otherwise. Then max(0, c + s - 1) is 1 only if both
# are: a corner in the graph is enough to say "and." GPT-2 uses *GELU*, which is much the same, but
# with the corner rounded off. It is x times the probability that a random number from the bell
# curve (mean 0, variance 1) is below x.
#
#     x           -3       -0.75    0        1        3
#     gelu(x)     -0.004   -0.170   0        0.841    2.996
#
# Think of each number in the hidden layer as a small question about the vector. ("Are we in a name,
# in capitals?") The first layer, c_fc, asks them all. GELU turns a clear no into nearly 0 and lets
# a yes pass, and c_proj translates what was answered into a change to the vector.
#
# The factor of 4 is a convention, and so are the names: fc stands for "fully connected," and the c
# is how OpenAI's code marks its linear layers. That code also computes GELU by a formula that is
# off by less than 0.0005. In MLX, the formula is called gelu_approx.


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


# First the positions talk, then each of them thinks: attention and an MLP together are a *block*.
# (ln_1 and ln_2 are LayerNorms, which we come to in a moment.)
#
#     x ---+---------------------->(+)---+---------------->(+)---> x
#          |                        ^    |                  ^
#          +--> ln_1 --> attention -+    +--> ln_2 --> MLP -+
#
# Look at the line that runs straight through. What attention and the MLP compute does not replace x
# but is added to it, by a *residual connection*, so each of them needs to learn only what to
# change. The vector that travels along this line, from the first block to the last, is called the
# *residual stream*. It is a road for the gradient as well. In a plain chain of layers (a *layer* is
# anything that turns vectors into vectors), slopes multiply, so after twelve layers with slopes of
# 1/2, only 1/4096 of the gradient reaches the first one. But x + f(x) has the slope 1 + f'(x).
# Thanks to the 1, part of the gradient passes every layer as if the layer were not there.
#
# As layer after layer adds to the stream, what keeps it from growing? Hardly anything, and it could
# swamp what reads it. From ever longer vectors, for instance, attention would compute ever larger
# scores, until softmax saturated. So what is read from the stream first passes through a
# *LayerNorm*, which shifts and scales the numbers in each vector to mean 0 and variance 1 (but for
# a tiny constant, which keeps it from dividing by 0):
#
#     x                                   1        2        6
#     minus the mean, 3                  -2       -1        3
#     divided by the root of 14/3        -0.93    -0.46     1.39        14/3 = (4 + 1 + 9) / 3
#
# Then it multiplies each number by a *gain* and adds a bias, both of them learned, in case that was
# too much of a good thing. (nn.RMSNorm, which today's models prefer, leaves out the mean and the
# bias.) GPT-2 puts its LayerNorms at the start of each side branch (pre-norm). The original
# transformer had them on the stream itself, and was harder to train.


class Block(nn.Module):
    """Attention, then MLP, each added to x: (B, T, n_emb) to (B, T, n_emb)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_emb)
        self.attn = MultiHeadAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_emb)
        self.mlp = MLP(config)

    def __call__(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)  # (B, T, n_emb)
        x = x + self.mlp(self.ln_2(x))  # (B, T, n_emb)
        return x


# %% 8. GPT
#
# Two ends are still open: how a token becomes a vector, and how a vector becomes logits.
#
# The first is almost disappointing. The model has a table, the *token embedding* wte, with a row of
# n_emb numbers for each token, and looks the row up. The rows start out random and are learned like
# everything else, and characters that behave alike end up with similar rows.
#
# But the vector must also say where the character stands. A weighted average knows no order: in the
# first attention layer, the "a" of "tea" and the "a" of "eta" would get the same average, over an
# "e", a "t", and an "a". So there is a second table, the *position embedding* wpe, with a row for
# each position, and the two rows are added. Why add them, rather than put them side by side?
# Because vectors this long have room for both. Suppose that the character's row points in one
# direction, such as (5, 0), and the position's row in another, such as (0, 3). Then both can still
# be read off their sum, (5, 3), and learning can see to it that the directions differ. And why can
# the model not see more than ctx_len characters? Because wpe has no more rows.
#
# At the other end, after the blocks and one last LayerNorm, ln_f, stands the *output head*, which
# has nothing to do with attention heads. The logit of a token is the dot product of the vector with
# that token's row of wte. So after "What is the cou", the model predicts "n" by making the vector
# of the "u" resemble the row of "n". Using the same table at both ends is called *weight tying*. It
# saves parameters, and what a row has learned about its character at one end serves at the other.
# The table has a row for each character of input.txt, and for no others, so a model cannot read a
# prompt with any other character.
#
# How should the parameters begin? If all were equal, all numbers in a vector would be equal, would
# get equal gradients, and would stay equal forever, many numbers doing the work of one. The
# matrices therefore start out random. (Biases can begin at 0 and gains at 1, since random matrices
# around them keep things different.) And they begin small. Because the rows of wte are small, all
# logits are small too, and at first no token is preferred by much. Equal logits would give each of
# the V tokens the probability 1/V, and a loss of -ln(1/V) = ln V. That gives us a test: the first
# loss must lie close to ln vocab_size. An honest beginner knows nothing, and says so. Usually the
# first loss is a little higher. As the logits are not quite equal, some tokens are preferred to
# others before anything has been learned, and as a rule that costs more than it gains. Suppose two
# tokens are equally likely, and the model gives them 0.6 and 0.4. Then the mean of -ln p is 0.714,
# and not ln 2 = 0.693. (A lucky model prefers tokens that are frequent, and starts a little lower.)


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
        # The parameters of a Module form a tree: dicts and lists, one inside another like the parts
        # they belong to, with arrays at the ends. This calls init_weight(name, array) for each
        # array, and puts the result in its place.
        self.update(tree_map_with_path(self.init_weight, self.trainable_parameters()))

    def init_weight(self, name, weight):
        """The initial value of a parameter, by its name, such as blocks.0.attn.c_proj.weight.

        It replaces MLX's own initial values, including those of layers that you add. Raises
        ValueError for a name that it has no rule for.
        """
        if name.endswith(".bias") and weight.ndim == 1:
            return mx.zeros_like(weight)
        if not name.endswith(".weight"):
            raise ValueError(f"init_weight has no rule for {name}, of shape {weight.shape}: add "
                             f"one, or, if it is a constant, begin its name with _")
        if weight.ndim == 1:  # the gains of LayerNorm
            return mx.ones_like(weight)
        # std is the standard deviation, and 0.02 is GPT-2's. In GPT-2, a layer that receives 768
        # numbers of size 1 puts out numbers of size 0.02 * sqrt(768) = 0.55. In our narrower
        # models, the outputs begin smaller, and grow. (OpenAI's code has 0.01 for wpe. And a layer
        # that multiplies two outputs, such as SwiGLU, needs 1 / sqrt(n_emb) here, or starts nearly
        # dead.)
        std = 0.02
        if name.endswith("c_proj.weight"):
            # Each block adds the outputs of two c_proj layers to the residual stream. A sum of N
            # independent numbers is typically sqrt(N) times as large as each, so we divide by that.
            std = 0.02 / math.sqrt(2 * self.config.n_layers)
        return mx.random.normal(weight.shape, scale=std)

    def __call__(self, tokens, caches=None):
        if caches is None:
            caches = [None] * len(self.blocks)
            start = 0
        else:  # only in section 9: the positions before `start` have been read already
            start = caches[0].offset
        end = start + tokens.shape[1]
        if end > self.config.ctx_len:
            raise ValueError(f"{end} tokens are more than ctx_len = {self.config.ctx_len}")
        positions = mx.arange(start, end)  # (T,)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, n_emb) + (T, n_emb)
        x = self.dropout(x)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache)  # (B, T, n_emb)
        x = self.ln_f(x)
        return self.wte.as_linear(x)  # x @ self.wte.weight.mT: (B, T, vocab_size)


# And that is all. Leave out dropout and the cache, and GPT-2 fits on one screen:


def forward_pass(model, tokens):
    """What model(tokens) computes, from beginning to end: (B, T) to (B, T, vocab_size).

    >>> model = GPT(GPTConfig(65, ctx_len=8, n_emb=16, n_heads=4, n_layers=2, dropout=0.0))
    >>> tokens = mx.array([[18, 47, 56, 57, 58]])
    >>> mx.allclose(forward_pass(model, tokens), model(tokens), atol=1e-5).item()
    True
    """
    positions = mx.arange(tokens.shape[1])  # (T,)
    x = model.wte(tokens) + model.wpe(positions)  # (B, T, n_emb)
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        normed = block.ln_1(x)  # (B, T, n_emb)
        q = attn.split_heads(attn.q_proj(normed))  # (B, n_heads, T, head_size)
        k = attn.split_heads(attn.k_proj(normed))
        v = attn.split_heads(attn.v_proj(normed))
        heads = attention_weights(q, k) @ v  # (B, n_heads, T, head_size)
        heads = heads.transpose(0, 2, 1, 3).reshape(x.shape)  # (B, T, n_emb)
        x = x + attn.c_proj(heads)  # (B, T, n_emb)
        hidden = nn.gelu_approx(mlp.c_fc(block.ln_2(x)))  # (B, T, 4 * n_emb)
        x = x + mlp.c_proj(hidden)  # (B, T, n_emb)
    return model.ln_f(x) @ model.wte.weight.mT  # (B, T, vocab_size)


# With 65 characters, the parameters of the default model are
#
#     wte          65 x 128                                    8,320
#     wpe         128 x 128                                   16,384
#     a block     ln_1 and ln_2                  512        two gains and two biases of 128
#                 attn: q, k, v           3 x 16,512        128 x 128 + 128 each
#                      c_proj                 16,512
#                 mlp: c_fc                   66,048        128 x 512 + 512
#                      c_proj                 65,664        512 x 128 + 128
#                                            198,272   x 3   594,816
#     ln_f                                                       256
#                                                            619,776
#
# So nearly all of them are in the blocks, and two-thirds of a block is its MLP. The smallest GPT-2
# has n_emb = 768, 12 heads, 12 blocks, ctx_len = 1024, and 50,257 tokens: 124 million parameters.
# It differs from ours only in size, tokens, and training, so OpenAI's weights can be loaded into
# this very class. The README shows how.


def count_parameters(model):
    """The number of parameters.

    >>> count_parameters(GPT(GPTConfig(65, ctx_len=128, n_emb=128, n_heads=4, n_layers=3,
    ...                                dropout=0.0)))
    619776
    """
    return sum(weight.size for _, weight in tree_flatten(model.parameters()))


# You will want to change the model, and see whether the loss gets better. But what if it gets
# wonderful? Forget the mask, or one transpose, and positions see the answers. The model is quick to
# take advantage, and reaches a loss that no honest model could. This function notices, and it will
# be called for each report that train() prints. (Not all mistakes are of this kind. If the targets
# are shifted the wrong way, so that each is the token before, then the model has only to copy, and
# the small model's loss falls to 0.05.)


def sees_the_future(model):
    """Whether earlier predictions depend on the last token, in which case the loss means nothing.
    Leaves the model in eval mode.

    If the last token changes, only the last prediction may change:

    >>> sees_the_future(GPT(GPTConfig(65, ctx_len=8, n_emb=16, n_heads=4, n_layers=2, dropout=0.5)))
    False
    """
    model.eval()
    tokens = mx.zeros((1, model.config.ctx_len), dtype=mx.int32)  # (1, ctx_len)
    changed = mx.zeros_like(tokens)  # (1, ctx_len)
    changed[:, -1] = model.config.vocab_size - 1  # a different last token
    change = mx.abs(model(changed) - model(tokens))  # (1, ctx_len, vocab_size)
    return mx.any(change[:, :-1] > 0).item()  # > 0: what does not depend on it is exactly equal


# %% 9. Generating text
#
# Suppose the model is trained. How does it write? It reads "What is the cou" and predicts a token,
# say "n". We append it, and let the model read the longer text. This is *autoregressive*
# generation:
#
#     for _ in range(100):
#         logits = model(mx.array([tokens[-ctx_len:]]))  # (1, T, vocab_size)
#         tokens.append(sample(logits[0, -1]))  # the last position predicts what comes next
#
# What should sample() do? The obvious choice is to take the most likely token each time, which is
# called *greedy decoding*. Try it: set temperature to 0, and use --sample. Our small model then
# begins well, "Second Citizen:⏎I have", and goes on with "the stand the stand the stand the said
# the stand", and much the same for as long as you let it. Once it comes back to words that it has
# written before, it tends to make the same choices again, and to come back once more. So we roll
# dice, loaded with the model's probabilities. The *temperature* decides how much they are loaded.
# The logits are divided by it, which raises the ratio of any two probabilities to the power
# 1 / temperature. At 0.5, for instance, a ratio of 2 : 1 becomes 4 : 1.
#
#     logits             2      1      0
#     temperature 0.5    0.87   0.12   0.02
#     temperature 1      0.67   0.24   0.09
#     temperature 2      0.51   0.31   0.19
#
# And then there is the long tail. At any point most tokens would be absurd. Each of them is
# unlikely, but there are many, and once one is drawn, the model must go on from an absurd text.
# *Top-k sampling* draws from the k most likely tokens only. Among 65 characters, a k of 40 hardly
# matters, but among 50,257 tokens it does.


def sample(logits, temperature=1.0, top_k=None):
    """Draws a token, an int, from logits (vocab_size,).

    temperature=0 is greedy. With top_k, only the top_k most likely tokens can be drawn; with None,
    all of them.
    """
    if temperature == 0:
        return mx.argmax(logits).item()
    candidates = mx.argsort(-logits)[:top_k]  # (top_k,) tokens, the most likely first
    choice = mx.random.categorical(logits[candidates] / temperature)  # softmax, then a draw
    return candidates[choice].item()


# The loop above works, but it is wasteful. For each new character it runs the whole text through
# the model again, and yet nothing has changed in the old positions. They cannot see the new
# character (that is what the mask is for), so in every block their keys and values are what they
# were a moment ago. We keep them in a *KV cache* (key/value cache), and run only the new token
# through the model. Its query meets the stored keys, so now there are T = 1 queries and S keys, and
# the causal mask has a single row, which hides nothing. Why are queries not kept as well? Because
# nobody will need them again: a query serves only its own position. What later positions want from
# this one is its key and its value in every block, and those are stored.
#
#     what goes through the model     without a cache     with a cache
#     first, the prompt "the cou"     t h e _ c o u       t h e _ c o u
#     then the new character "n"      t h e _ c o u n     n


class KVCache:
    """The keys and values of all positions that one attention layer has read.

    With a cache, a text can be read in parts, and the logits are the same as without:

    >>> model = GPT(GPTConfig(65, ctx_len=8, n_emb=16, n_heads=4, n_layers=2, dropout=0.0))
    >>> tokens = mx.array([[18, 47, 56, 57, 58]])
    >>> caches = [KVCache() for _ in model.blocks]
    >>> parts = [model(tokens[:, :3], caches), model(tokens[:, 3:], caches)]
    >>> mx.allclose(mx.concatenate(parts, axis=1), model(tokens), atol=1e-5).item()
    True
    """

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
    """Continues a list of at least one token: yields max_new_tokens more, one by one.

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
            # The window is full. For every new token, the simple loop drops the oldest, so that all
            # others move to new positions and have to be read again. We drop half, and read again
            # only once in a while. The price: right afterward, the model remembers only half as
            # much.
            window = window[-max(1, ctx_len // 2) :]  # the newer half
            unread = window
            caches = [KVCache() for _ in model.blocks]


def continue_text(model, tokenizer, prompt, length):
    """Yields `length` tokens that continue the prompt, as strings.

    Sets MLX's random seed, so that the same `seed` gives the same text. Raises KeyError for a
    character that the model does not know.
    """
    mx.random.seed(seed)
    tokens = tokenizer.encode(prompt) or [0]  # no prompt: token 0, here the newline
    for token in generate(model, tokens, length, temperature, top_k):
        yield tokenizer.decode([token])


def type_out(model, tokenizer, prompt):
    """Prints the prompt, and then each character as the model writes it. Returns what it wrote."""
    print(prompt, end="", flush=True)
    text = ""
    for char in continue_text(model, tokenizer, prompt, max_new_tokens):
        print(char, end="", flush=True)
        text += char
    print()
    return text


# %% 10. Training
#
# The model is built, it can even write, and it knows nothing. A training step takes a batch, finds
# the gradient of its loss, and moves every parameter a little. The gradient is the mean over all
# questions in the batch, so what would help with one of them alone mostly cancels out, and what
# helps with many remains. Because the batches are drawn at random, this is called *stochastic*
# gradient descent.
#
# How far should a parameter move? In section 5 it was learning rate times slope. But take two
# parameters: the slope of one is 0.001 in every batch, and that of the other flips between 10 and
# -10. Surely the first should go ahead, since all batches agree about it, and the second should
# stay where it is. Slope times any one learning rate would do the opposite. *Adam* does what we
# want. For each parameter it keeps two moving averages, both of which begin at 0: m averages its
# slope g over the last 1 / (1 - beta1) = 10 steps or so, and v averages the square of g over the
# last 100.
#
#     m = beta1 * m + (1 - beta1) * g
#     v = beta2 * v + (1 - beta2) * g * g
#     w = w - lr * m / sqrt(v)
#
# With each new g, all the older ones fade: in m, the g of ten steps ago counts 0.9 ** 10 = 0.35
# times as much as the newest. (We leave out a tiny constant that keeps the last line from dividing
# by 0, and a correction for the first steps, of which more below.)
#
# As sqrt(v) is the typical size of g, dividing by it cancels the size. If g is the same in each
# step, be it 0.001 or 10, then m / sqrt(v) comes to 1, and w moves by the full lr. If g alternates
# between 10 and -10, the terms of m mostly cancel while sqrt(v) stays 10, and the ratio is only
# 0.05. With random signs it is typically 0.23, as you can check in a few lines of Python. In short,
# where the batches agree, w goes ahead, and where they quarrel, it only wanders about.
#
# AdamW adds *weight decay*: in each step, it also shrinks w by a small part of itself,
# lr * weight_decay * w. A weight then stays large only if its gradient keeps insisting. With large
# weights a single detail can decide everything, as in a rule that fits one line of the training
# text and no other. With small ones, many details must agree.


def make_optimizer(total_steps):
    r"""AdamW for a run of total_steps steps, with this *learning-rate schedule*:

        lr           /\
                   /    `-.
        0        /          `-.
                 0  warmup     total_steps

    Why does the rate rise at first? In the very first step, m is 0.1 * g and v is 0.01 * g * g, so
    m / sqrt(v) is 1 or -1, however small g is, and each parameter would move by the full lr on the
    word of a single batch. During *warmup*, while m and v gather evidence, steps are kept short.
    And why does the rate fall? Near the goal the batches quarrel, and every parameter keeps jumping
    around. A lower rate lets it settle.

    The rate is the lower of two straight lines. One rises to lr during warmup. The other starts at
    lr in step 0, and falls to 0 by the end. So they cross a little below lr, or, in a run of few
    steps, far below it; such a run needs a shorter warmup.
    """

    # AdamW calls this with the number of the step, an mx.array, and wants an mx.array back. (The
    # number is an unsigned integer: below 0 it would wrap around to a huge one.) It is common to
    # let the rate fall along half a cosine wave:
    #     fall = (1 + mx.cos(math.pi * step / total_steps)) / 2
    # For a constant rate after the warmup: return lr * mx.minimum(rise, 1)
    def learning_rate(step):
        rise = (step + 1) / max(1, warmup_steps)
        fall = mx.maximum(0, 1 - step / total_steps)
        return lr * mx.minimum(rise, fall)

    # Only the matrices of the blocks are decayed. Biases, gains, and embeddings are left alone:
    # when they were decayed as well, the small model got worse by 0.02 (on Tiny Shakespeare).
    # MultiOptimizer gives the first optimizer what is_decayed picks, and the second one the rest.
    def is_decayed(name, weight):
        return name.startswith("blocks") and weight.ndim == 2

    # bias_correction: m and v both start at 0, so at first both are too small. v takes longer to
    # catch up, so without a correction, m / sqrt(v) would be up to 2.1 times as large as it should
    # be. The correction scales both of them up to their proper size. (Here, "bias" means this
    # fault, and not the biases of a layer.)
    betas = [beta1, beta2]
    decayed = optim.AdamW(learning_rate, betas, weight_decay=weight_decay, bias_correction=True)
    others = optim.AdamW(learning_rate, betas, weight_decay=0.0, bias_correction=True)
    return optim.MultiOptimizer([decayed, others], [is_decayed])


# Before we write the step itself, meet three habits of MLX, each of which is a help, and two of
# which will trip you up one day if nobody has warned you.
#
# It is lazy. Ask for `a + b`, and it computes nothing; it only notes, in a *computation graph*,
# that there is something to add. The work is done when somebody needs a value: .item(), print, or
# mx.eval. That lets MLX see a whole step before it computes any of it. The catch? A loop in which
# nobody ever asks for a value computes nothing at all, while its graph grows and grows.
#
# It differentiates. That is why you find no backward pass in this file: nn.value_and_grad(model,
# loss_fn) is a function that returns the loss and the gradient, a tree of the same form as the
# parameters.
#
# And it compiles. When you first call a function that went through mx.compile, its Python code runs
# once, and MLX records the operations on arrays. All later calls replay the recording. (If the
# inputs have other shapes or types, MLX records again.) That is often faster, most of all for a
# small model, since Python is out of the loop and small operations are merged. Here, the catch is
# the same as the gain: no Python runs. What does that do to the code inside?
#
#     print("hello")                 prints only while MLX records
#     print(loss.item())             fails: while MLX records, there is no value yet
#     max_norm and lr, set later     keep their old values
#     dropout                        stays on if it was on in the first call
#     parameters, m, v, step count   do change: they are in the list `state` below
#     random numbers                 do change, for the same reason
#
# (So the schedule does go on, as it follows the step count.) While you experiment inside step, end
# make_step with a plain `return step`. Then step is ordinary Python again. If a compiled step fails
# while MLX records it, the parameters may be left as mere placeholders, without numbers. That model
# is lost; make a new one, as each call of train() does.
#
# And if you have several Macs? They can train one model together. mlx.launch starts this program on
# each of them (see the README), each finds the gradient for its own rows of a batch, and the mean
# of these gradients is the gradient of the whole batch. This is called *data parallelism*. As all
# machines begin with the same weights and make the same moves, their models stay identical. In
# make_step, the lines with `machines` and `mine` do it. On a single Mac, they change nothing.


def all_machines():
    """The group of machines that train together, usually this one alone. The group's size() is how
    many there are, and its rank() is this one's number, from 0. Each call gives the same group."""
    # In a ring, each machine talks to the next. If we left the choice to MLX, it would try other
    # kinds of connection as well, one of which (MPI) hangs on some computers.
    return mx.distributed.init(backend="ring")


def make_step(model, optimizer):
    """Returns a function step(x, y), which trains the model on a batch and returns its loss (the
    loss of this machine's rows, if there are several machines)."""
    loss_and_grad = nn.value_and_grad(model, loss_fn)  # or with a loss of your own
    machines = all_machines()
    mine = slice(machines.rank(), None, machines.size())  # this one's share: x[rank::size]

    def step(x, y):
        loss, grads = loss_and_grad(model, x[mine], y[mine])
        grads = nn.average_gradients(grads, machines)
        # *Gradient clipping*: if the gradient as a whole is longer than max_norm, it is scaled down
        # to that length. Without this, a single odd batch could dominate m and v for many steps.
        grads, _ = optim.clip_grad_norm(grads, max_norm)
        optimizer.update(model, grads)
        return loss

    # Three objects hold all arrays that step reads or changes (apart from x and y): two dicts, and
    # one that keeps the state of the random numbers. In each call, the compiled step takes the
    # current values out of these objects, and puts the new values into them. So if one of the
    # objects is replaced afterward, step does not notice, and goes on with the old one.
    state = [model.state, optimizer.state, mx.random.state]
    return mx.compile(step, inputs=state, outputs=state)


# How will we know when to stop? While the loss falls on both sets, all is well. If it still falls
# on the training set but rises on the validation set, the model has begun to memorize, so use more
# text, more dropout or weight decay, or a smaller model. We keep the weights of the epoch that did
# best, which is *early stopping* in its laziest form: it does not even stop. Strictly speaking, the
# loss that we report is then a little flattering, being the lowest of several on the same text. The
# remedy would be to hold out one more part, the *test set*.


def evaluate(model, tokens):
    """The mean loss over all rows of tokens, in nats per token. Leaves the model in eval mode."""
    model.eval()  # dropout off
    total = count = 0
    for x, y in get_batches(tokens, model.config.ctx_len, batch_size):
        total += loss_fn(model, x, y).item() * y.size  # the last batch can be smaller
        count += y.size
    return total / count


class UserError(Exception):
    """A mistake that you can fix, such as too short a text. main() shows it without a traceback."""


# Here, then, is the most interesting part of what a run of the small model prints: the losses, and
# under them what the model writes at that point.
#
#     Untrained | train = 4.1989 | val = 4.2001 | perplexity 66.7
#               uQv$?Mz &zsLMx3led,qOyxSH'⏎WUkApi:ikizTyBrFNW'.kJXXZbQviZicmMrM'bzxII
#               an dhe sand lith mulup, che ke o donow mup ik bre the ka  there!⏎Thad
#     Epoch 0 | train = 1.7722 | val = 1.7604 | perplexity 5.81
#               PEEN PSIMEN MAUGER:⏎First the spett a dot thands that keep the Punder
#     Epoch 1 | train = 1.6390 | val = 1.6546 | perplexity 5.23
#               You land no nothing, and a put behis?⏎⏎PERRIN:⏎I had fine. I had a ha
#     Epoch 2 | train = 1.5241 | val = 1.5339 | perplexity 4.64
#               word not call to spamer, and he sleam, swith a strace keep the Ling.⏎
#
# Watch it learn. The first loss lies where it must, close to 4.17. After 500 steps, when train()
# prints a line of text but no losses, the model has found out about spaces, vowels, and the length
# of words. After one epoch it has beaten n = 3, and knows that in a play, a speech begins with a
# name, mostly in capitals, and a colon. In the end it is close to n = 4. (How can the loss, after
# epoch 0, be lower on the text that the model has not read? The two texts come from different
# plays, and one may be a little easier.) Nobody has told the model any of this. All it ever got was
# the next character.
#
# And this is the run itself, from the file to the finished model. It calls some functions that you
# have not met. Their names say what they do, and section 12 has them in much the same order.


def train(resume=False):
    """Trains a model on input.txt, with a checkpoint after each epoch. Returns a dict for each
    epoch: its losses, "train" and "val", and how many "minutes" it took.

    With resume=True, goes on with an interrupted run. Raises UserError, and what load_text raises.
    """
    check_settings(SETTINGS)
    text = load_text()
    tokenizer = CharTokenizer(build_vocab(text))
    train_tokens, val_tokens = split(np.array(tokenizer.encode(text), dtype=np.int32))
    train_part = train_tokens[: len(val_tokens)]  # to save time, we report the loss on this part
    steps_per_epoch = count_batches(train_tokens, ctx_len, batch_size)
    if steps_per_epoch < 1 or len(val_tokens) <= ctx_len:  # a row needs ctx_len + 1 tokens
        raise UserError("input.txt holds too little: add text, or lower ctx_len or batch_size")
    total_steps = num_epochs * steps_per_epoch

    mx.random.seed(seed)
    model = GPT(GPTConfig(vocab_size=len(tokenizer.vocab), ctx_len=ctx_len, n_emb=n_emb,
                          n_heads=n_heads, n_layers=n_layers, dropout=dropout))
    optimizer = make_optimizer(total_steps)
    optimizer.init(model.trainable_parameters())  # creates m and v, all 0
    settings = collect_settings(text, model)
    history = []
    if resume:
        history = resume_run(model, optimizer, settings)
    check_machines_agree([settings, history])  # if there are several
    if not resume:
        print_settings(tokenizer, settings)
        report("Untrained", evaluate(model, train_part), evaluate(model, val_tokens),
               model, tokenizer)

    step = make_step(model, optimizer)
    progress = Progress(len(history) * steps_per_epoch, total_steps)
    for epoch in range(len(history), num_epochs):
        started = time.perf_counter()
        rng = np.random.default_rng([seed, epoch])  # so that a resumed epoch is the same
        mx.random.seed(int(rng.integers(2**31)))  # for dropout: new numbers in each epoch
        model.train()  # dropout on
        for x, y in get_batches(train_tokens, ctx_len, batch_size, rng):
            loss = step(x, y)
            # Start computing all this, but do not wait, so that Python can meanwhile prepare the
            # next step.
            mx.async_eval(loss, model.state, optimizer.state)
            progress.update(loss)
            if progress.step == 500:  # a first look at the small model; for more, see the README
                show_line(model, tokenizer)
                model.train()  # dropout on again, in case step is not compiled

        train_loss, val_loss = evaluate(model, train_part), evaluate(model, val_tokens)
        check_finite(val_loss)
        minutes = (time.perf_counter() - started) / 60
        history.append({"train": train_loss, "val": val_loss, "minutes": minutes})
        save_epoch(model, optimizer, tokenizer, settings, history)
        report(f"Epoch {epoch}", train_loss, val_loss, model, tokenizer)

    finish(settings, history)
    return history


# %% 11. Looking inside
#
# What has the model learned, and where does it keep what it knows? We can look. Here is the trained
# small model in the middle of our word, drawn by the function below:
#
#     $ python train.py --look "What is the cou"
#                       What is the cou
#     surprise           ▁▂  ▄▁ ▃ ▁▁▅▂▃
#     block 0, head 0              ▁▇
#     block 0, head 1             ▁▅▁
#     block 0, head 2               █
#     block 0, head 3              ▁▇
#     block 0, head 4              ▁▆
#     block 0, head 5   ▄     ▁ ▁   ▁ ▁
#     block 0, head 6                █
#     next 'n'          0.33 ████████████████
#     next 'r'          0.30 ███████████████
#     next 'l'          0.24 ████████████
#     next 's'          0.06 ███
#     ...
#
# The surprise is the loss at each character. It tends to be high where a word begins, and low once
# the rest can be guessed: after "Wha", a "t" is no news at all. Each head has a row, which shows
# what the last position, the "u", attends to. Head 6 attends to the "o", the character just before
# the "u". In this word, heads 0, 2, 3, and 4 attend to the "c" before that, and head 1 to the space
# before the "c". With the "u" itself, that makes " cou", and the model expects an "n", an "r", or
# an "l", as in "count", "court", and "could". (It would rather have a count than a court.) Nor is
# this the luck of one word. On average over the validation set, head 6 gives 0.91 of its weight to
# the character before, and each of heads 0 to 4 gives between 0.79 and 0.95 of its weight to the
# four characters before.
#
# We gave the model queries and keys made of random numbers. Out of these, following slopes
# downhill, it has built much the same thing that section 5 called hard to beat: it has all but
# reinvented the n-gram model. Only head 5 has other interests, far back in the line. With more
# blocks, heads attend to what other heads have found, and the picture is not so easy to read.


def bars(shares):
    """One bar for each share: blank for 0 or nearly 0, full for nearly 1 and above.

    >>> bars([0.1, 0.5, 1.0])
    '▁▄█'
    """
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * min(share, 1))] for share in shares)


def one_line(text):
    """The text with newlines shown as ⏎, and without characters that would move the cursor."""
    text = text.replace("\n", "⏎")
    return "".join(char if char.isprintable() else " " for char in text)


def look(model, tokenizer, prompt):
    """Draws how surprising each character is, what each head attends to, and what comes next.

    Raises UserError for a prompt that is longer than the context.
    """
    tokens = tokenizer.encode(prompt) or [0]
    if len(tokens) > model.config.ctx_len:
        raise UserError(f"the prompt has {len(tokens)} characters, and the model can see only "
                        f"{model.config.ctx_len}")
    recorded = []  # the attention weights of each block, (1, n_heads, T, T)

    def record(weights):
        recorded.append(weights)
        return weights

    # In every block the weights pass through a dropout layer, which does nothing in eval mode. So
    # we can put something else in its place, and see them pass.
    model.eval()
    dropouts = [block.attn.attn_dropout for block in model.blocks]
    for block in model.blocks:
        block.attn.attn_dropout = record
    logits = model(mx.array([tokens]))[0]  # (T, vocab_size)
    for block, dropout_layer in zip(model.blocks, dropouts, strict=True):
        block.attn.attn_dropout = dropout_layer

    print(" " * 18 + one_line(tokenizer.decode(tokens)))
    log_p = nn.log_softmax(logits)  # (T, vocab_size)
    uniform_loss = math.log(len(tokenizer.vocab))  # a full bar: no better than a uniform guess
    # Position i predicts tokens[i + 1], which is number i of tokens[1:].
    surprise = [-log_p[i, token].item() / uniform_loss for i, token in enumerate(tokens[1:])]
    print("surprise".ljust(19) + bars(surprise))  # 19: nothing predicts the first character
    for i, weights in enumerate(recorded):
        from_last = weights[0, :, -1]  # (n_heads, T): what the last position attends to
        for head, row in enumerate(from_last.tolist()):
            print(f"block {i}, head {head}".ljust(18) + bars(row))
    probabilities = mx.softmax(logits[-1])  # (vocab_size,)
    for token in mx.argsort(-probabilities)[:8].tolist():
        p = probabilities[token].item()
        print(f"next {tokenizer.vocab[token]!r}".ljust(18) + f"{p:.2f} {'█' * round(50 * p)}")


# This is where the lesson ends. What should you do now? Change something, and before you run it,
# guess what it will do. The README has experiments, and tested diffs for what today's models do
# differently (RMSNorm, no biases, rotary positions, SwiGLU, grouped queries, Muon). The next
# section begins with what to read, and what is good to know before you change anything.
#
# But first, turn back to page one. GPT-2 guesses what comes next, and that is all it can do. You
# now know every part of the model, and nothing was hidden. Make our default model a hundred times
# as wide and thirty times as deep, let it see sixteen times as far, feed it the internet, and you
# have something very much like GPT-3. And yet no line of this file says what a word is, or a verse,
# or a speaker. The model follows slopes downhill, and there it finds them.

# %% 12. The parts of a run
#
# The papers behind the lesson. Attention: Bahdanau et al., 2014. The transformer: Vaswani et al.,
# "Attention Is All You Need," 2017. GPT-2: Radford et al., "Language Models Are Unsupervised
# Multitask Learners," 2019. Byte-pair encoding: Sennrich et al., 2015. Residual connections: He et
# al., 2015. LayerNorm: Ba et al., 2016. GELU: Hendrycks and Gimpel, 2016. Dropout: Srivastava et
# al., 2014. Weight tying: Press and Wolf, 2016. Adam: Kingma and Ba, 2014. AdamW: Loshchilov and
# Hutter, 2017. Top-k sampling: Fan et al., 2018. Modified Kneser-Ney smoothing: Chen and Goodman,
# 1998.
#
# Below is what train() calls, roughly in order of appearance. It holds nothing new about GPT. But
# first, a few things that will save you trouble when you change anything above. (The README has
# four larger changes, ready and tested: reporting losses and saving weights every 500 steps,
# gradient accumulation for batches that do not fit into memory, bfloat16, and a script that tries
# several learning rates. Each has traps of its own.)
#
# The model:
#
# - A new size belongs in the settings, in GPTConfig, and in the call to GPTConfig in train(). If it
#   cannot be 0, it belongs in AT_LEAST_1, below, as well. In GPTConfig, make it the last field,
#   with a default that leaves the model as it was, so that older files still load. Then check
#   whether `parameters`, in the first lines of a run, is what it should be.
# - init_weight goes by name. In a layer of your own, name a matrix or a gain `weight`, and a bias
#   `bias`. (An array called `weight` that has a single axis begins as all ones. So an nn.PReLU, a
#   ReLU whose left half has a learned slope, would begin as a straight line. Give it a rule of its
#   own.) is_decayed goes by name as well, and takes all matrices in `blocks`.
# - For rotary positions (RoPE), rotate q and k just before `if cache is not None`. Their first
#   position is cache.offset, or 0 without a cache. Validation uses no cache, so a wrong offset
#   spoils only what the model writes; the doctest of KVCache would catch it.
# - Some doctests hold only for a GPT-2 whose tokens are single characters. Once you have another
#   model, they may fail, and rightly so.
#
# The text:
#
# - If your tokens are not characters, do not compare losses with ours: a loss is per token. A
#   prompt should then end where a token ends, and an empty one becomes token 0, which should
#   therefore occur in the training text. With --look, a bar stands for a token, not for a
#   character. If you write another class in place of CharTokenizer, let load_model build it as
#   well.
# - To train on several texts, split each of them, then join all the first parts for training, and
#   all the last parts for validation. Otherwise the validation set is the end of the last text.
#   (Either way, train_part comes from the beginning, perhaps from the first text alone.)
# - To stop at a certain character, return from the loop in continue_text. (show_line goes through
#   it as well.)
#
# The training:
#
# - If you change loss_fn, it must remain a mean over rows, since on_two_cores, below, takes the
#   mean of two halves. evaluate uses loss_fn as well. To change the training alone, give another
#   function to value_and_grad in make_step.
# - show_line and report set the random seed. If you call them again and again in mid-epoch, set
#   another seed after each call, or dropout strikes the same places each time. To save in
#   mid-epoch, use save_model, and not save_epoch, which moves and overwrites MODEL. And add nothing
#   to history: --resume takes its length for the number of epochs.
# - The learning rate follows the number of updates. If you update only after every fourth batch,
#   give make_optimizer a quarter of total_steps, and drop what is left over at the end of an epoch,
#   since a checkpoint does not hold it.
# - All weights are float32, good for about seven digits. (Some GPUs multiply matrices with only
#   three, unless MLX_ENABLE_TF32=0 is set.) Large models compute in bfloat16, which does not have
#   even three, so 1 + 0.001 is still 1. A gain of 1 that should move in such small steps would not
#   move at all. So the weights are kept in float32, and each step computes with bfloat16 copies.
# - optim.Muon, the optimizer of the README's last step, has another kind of weight decay, which
#   made things worse here. Set it to 0.
# - In a script, write `import train` (not `from train import train`), set train.lr, say, and call
#   train.train(), which compiles step anew. It is too late to set train.small, which chose the
#   sizes during the import. Set the sizes themselves.


MODEL = "model.safetensors"  # the best weights of this run
PREVIOUS = "previous.safetensors"  # what MODEL was before this run; rename it to bring it back
CHECKPOINT = "checkpoint.safetensors"  # what --resume needs
RUN_LOG = "runs.jsonl"  # a line for each finished run
COMPLETIONS = "completions.txt"  # the text written at the end of a run

AT_LEAST_1 = ["ctx_len", "n_emb", "n_heads", "n_layers", "num_epochs", "batch_size",
              "max_new_tokens", "top_k"]  # all other settings that are numbers: at least 0
SAMPLING = ["max_new_tokens", "temperature", "top_k"]  # those that matter only for writing


def check_settings(names):
    """Raises UserError if one of these settings is too low, or if n_emb is not a multiple of
    n_heads.

    names is SETTINGS for training, and SAMPLING for --sample and --look, where the sizes are those
    of the saved model. (Some other mistakes, such as dropout = 1, are reported by MLX or Python.)
    """
    for name in names:
        value = globals()[name]
        least = 1 if name in AT_LEAST_1 else 0
        if isinstance(value, (int, float)) and not value >= least:  # this refuses nan as well
            raise UserError(f"{name} = {value} must be at least {least}")
    if "n_heads" in names and n_emb % n_heads != 0:
        raise UserError(f"n_emb = {n_emb} must be a multiple of n_heads = {n_heads}")


def collect_settings(text, model):
    """What identifies a run: all settings, the number of parameters (which gives away some edits to
    the model, but not all), and, under "input.txt", a checksum of the text."""
    settings = {name: globals()[name] for name in SETTINGS}
    return {**settings, "parameters": count_parameters(model),
            "input.txt": f"{zlib.crc32(text.encode()):08x}"}


def resume_run(model, optimizer, settings):
    """Restores model and optimizer from CHECKPOINT. Returns the history of that run.

    Raises UserError if that run had a different text or different settings, or is finished.
    SAMPLING may differ, and so may num_epochs: the learning rate then goes on as in a run of the
    new length.
    """
    saved, notes = load(CHECKPOINT)  # model and optimizer; settings and history
    # A file that is no checkpoint has no settings. With {} in their place, all of ours count as
    # changed.
    changed = changes(notes.get("settings", {}), settings, except_for=["num_epochs", *SAMPLING])
    if changed:
        raise UserError(f"changed since that run: {', '.join(changed)}. Undo this, or start over")
    history = notes["history"]
    if len(history) >= num_epochs:
        raise UserError("that run is finished: raise num_epochs to keep training")
    if shapes(saved) != shapes({"model": model.parameters(), "optimizer": optimizer.state}):
        raise UserError(f"{CHECKPOINT} does not match train.py: undo edits, or start over")
    model.update(saved["model"])  # which accepts any shapes, hence the check above
    optimizer.state = saved["optimizer"]  # a new dict, so make_step must come later (see there)
    print(f"Resuming after epoch {len(history) - 1}, val = {history[-1]['val']:.4f}")
    return history


def shapes(tree):
    """The shape of each array in a tree, by its name."""
    return {name: array.shape for name, array in tree_flatten(tree)}


def changes(old, new, except_for=()):
    """The differences between two dicts of settings, in words. A setting that one of them lacks
    counts as None.

    >>> changes({"lr": 0.01, "seed": 0}, {"lr": 0.001, "seed": 0})
    ['lr 0.01 to 0.001']
    """
    return [f"{name} {old.get(name)} to {new.get(name)}" for name in {**old, **new}
            if old.get(name) != new.get(name) and name not in except_for]


def check_machines_agree(plan):
    """Raises UserError if the machines differ in their plans, [settings, history], or cannot share
    the rows of a batch equally.

    With --resume, each machine has just read its own copy of the checkpoint (you copied it there).
    If one copy is older, their histories differ. And the shares must be equal, because the mean of
    the means of unequal shares is not the mean of all rows.
    """
    checksum = mx.array([zlib.crc32(json.dumps(plan).encode())], dtype=mx.uint32)  # (1,)
    # Each machine gets the checksums of all, and compares them with its own.
    checksums = mx.distributed.all_gather(checksum, group=all_machines())  # (machines,)
    if mx.any(checksums != checksum):
        raise UserError("the machines differ in input.txt, in their settings, or in a checkpoint")
    if batch_size % len(checksums) != 0:
        raise UserError(f"{len(checksums)} machines cannot share batch_size = {batch_size} rows")


WIDTH = 79  # of a line of output, in characters


def print_settings(tokenizer, settings):
    """Prints what will be trained, so that you notice a wrong setting or character."""
    V = len(tokenizer.vocab)
    print(textwrap.fill(", ".join(f"{name}={value}" for name, value in settings.items()), WIDTH))
    print(f"{V} different tokens: {''.join(tokenizer.vocab[:100])!r}")
    print(f"Uniform guessing: loss = ln {V} = {math.log(V):.4f}")
    print("After the first epoch, you can stop the run with Ctrl-C, and go on with --resume.")


class Progress:
    """Prints once a second how far the training has come, always on the same line."""

    def __init__(self, step, total_steps):
        self.step = step  # steps made so far, some of them perhaps before a --resume
        self.total_steps = total_steps
        # The first step of this process is slow, because MLX compiles, so it is not timed.
        self.first_step = step + 1

    def update(self, loss):
        """Counts a step. Once a second, also checks and prints its loss, a scalar array. Raises
        UserError if the loss is nan or infinite."""
        self.step += 1
        now = time.perf_counter()  # seconds
        if self.step == self.first_step:  # the clock starts after it
            self.started = self.last_print = now
        if now - self.last_print < 1:
            return
        self.last_print = now
        loss = loss.item()  # not in every step, since this waits for the GPU
        check_finite(loss)
        steps_per_second = (self.step - self.first_step) / (now - self.started)
        tokens_per_second = steps_per_second * batch_size * ctx_len
        minutes_left = (self.total_steps - self.step) / steps_per_second / 60
        line = (f"step {self.step:,}/{self.total_steps:,}, loss {loss:.2f}, "
                f"{tokens_per_second:,.0f} tokens/s, {minutes_left:.1f} min left")
        columns = shutil.get_terminal_size().columns - 1  # a full row could make the cursor go down
        print(line.ljust(WIDTH)[:columns], end="\r", flush=True)  # \r: the next line overwrites it


def check_finite(loss):
    """Raises UserError if a loss is nan or infinite."""
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss}. Lower lr, or, if it was {loss} from the start, look "
                        f"for a mistake in your last edit")


def report(title, train_loss, val_loss, model, tokenizer):
    """Prints the losses, what the model writes now, and a warning if it sees the future. Leaves the
    model in eval mode."""
    perplexity = mx.exp(val_loss).item()  # inf if the loss is huge; math.exp would raise an error
    losses = f"{title} | train = {train_loss:.4f} | val = {val_loss:.4f}"
    # The spaces wipe out the line that Progress has left on the screen.
    print(f"{losses} | perplexity {perplexity:.3g}".ljust(WIDTH))
    show_line(model, tokenizer)
    if sees_the_future(model):
        print(" " * 10 + "Warning: this model sees the future, so its losses mean nothing.")


def show_line(model, tokenizer):
    """Prints a line of text that the model writes now. Sets eval mode and the random seed."""
    text = "".join(continue_text(model, tokenizer, "", WIDTH - 10))
    print((" " * 10 + one_line(text))[:WIDTH], flush=True)  # cut, if your tokens are longer


def save_epoch(model, optimizer, tokenizer, settings, history):
    """Saves the model, if it is the best so far, and then the checkpoint.

    After the first epoch of a new run, MODEL and CHECKPOINT are still those of an earlier run. The
    old checkpoint is removed before anything is saved. Otherwise, if we were killed between the two
    saves, the old checkpoint would stand beside the new model, and --resume would continue the
    earlier run, whose best weights would no longer be in MODEL.
    """
    if all_machines().rank() > 0:  # only the first machine writes files
        return
    if len(history) == 1:  # the first epoch of a new run
        Path(CHECKPOINT).unlink(missing_ok=True)
        if os.path.exists(MODEL):
            os.replace(MODEL, PREVIOUS)
    if history[-1]["val"] == min(epoch["val"] for epoch in history):
        save_model(MODEL, model, tokenizer)
    save(CHECKPOINT, {"model": model.parameters(), "optimizer": optimizer.state},
         {"settings": settings, "history": history})


def save(path, tree, notes):
    """Writes a tree of arrays and a dict of notes to a safetensors file.

    Such a file holds arrays by name, and strings. So the tree is flattened: the array in
    tree["a"]["b"] gets the name "a.b". And the notes become one string. Raises UserError or
    OSError.
    """
    path = Path(path).resolve()
    arrays = dict(tree_flatten(tree))
    # Write into a temporary folder, and move the file into place when it is complete. So the file
    # at path is never half written, even if we are killed, or two runs save at once. (The folder is
    # beside that file, on the same disk, where moving is only renaming.)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=path.parent) as folder:
        unfinished = os.path.join(folder, path.name)
        try:
            mx.save_safetensors(unfinished, arrays, {"notes": json.dumps(notes)})
        except RuntimeError as error:  # the disk is full, for example
            raise UserError(f"{path} could not be saved: {error}") from None
        os.replace(unfinished, path)


def load(path):
    """The tree and the notes that save() wrote. Raises UserError if they cannot be read."""
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        return tree_unflatten(arrays), json.loads(metadata["notes"])
    except (RuntimeError, KeyError, ValueError):  # no such file, no notes, notes of another form
        raise UserError(f"cannot read {Path(path).resolve()}: run python train.py first") from None


def save_model(path, model, tokenizer):
    """Saves the weights, and, in the same file, what load_model() needs to build the model."""
    save(path, model.parameters(), {"config": asdict(model.config), "vocab": tokenizer.vocab})


def load_model(path):
    """A saved model, in eval mode, and its tokenizer. Raises UserError."""
    weights, notes = load(path)
    try:
        config = GPTConfig(**notes["config"])  # the entries of the dict become the arguments
        model = GPT(config)
        model.load_weights(tree_flatten(weights))  # refuses other names and shapes
        model.eval()
        return model, CharTokenizer(notes["vocab"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} does not match train.py: undo edits, or train again") from None


def finish(settings, history):
    """Logs the run, writes a text with the best weights, and compares the run with an earlier
    one."""
    if all_machines().rank() > 0:
        return
    best = min(epoch["val"] for epoch in history)
    minutes = sum(epoch["minutes"] for epoch in history)
    device = mx.device_info()["device_name"]
    run = {"finished": time.strftime("%Y-%m-%d %H:%M"), "device": device, "mlx": mx.__version__,
           "minutes": round(minutes, 1), "best_val": best, "settings": settings, "history": history}
    with open(RUN_LOG, "a", encoding="utf-8") as log:
        log.write(json.dumps(run) + "\n")

    text = type_out(*load_model(MODEL), "")
    Path(COMPLETIONS).write_text(text, encoding="utf-8", newline="\n")  # on Windows as well
    print(f"\nThe best weights, in {MODEL}, have a validation loss of {best:.4f}. "
          f"Trained in {minutes:.1f} minutes ({device}, MLX {mx.__version__}).")
    old = previous_run_on(settings["input.txt"])  # the checksum of the text
    if old is not None:
        changed = ", ".join(changes(old["settings"], settings)) or "no settings"
        print(f"An earlier run on this text had {old['best_val']:.4f}. Changed since: {changed}.")


def previous_run_on(checksum):
    """The last run in RUN_LOG before this one, on a text with this checksum, or None."""
    before = None
    # All lines but the last one, which is this run.
    for line in Path(RUN_LOG).read_text(encoding="utf-8", errors="replace").splitlines()[:-1]:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # skips what is not a run
            run = json.loads(line)
            if run["settings"]["input.txt"] == checksum:
                before = run
    return before


def on_two_cores(one_core_loss):
    """Returns a function that computes the same loss, a mean over rows, on two CPU cores: each gets
    half of the rows, and the two losses are averaged.

    MLX computes operations in the order in which they stand in a queue, called a stream. On a CPU,
    each stream uses one core, so it takes a second stream to use a second core. Operations made
    under mx.stream(...) go there, and so does what belongs to them in the backward pass. The sum at
    the end waits for both.
    """
    # Thread-local, so that it also works if train() is called from another thread than this one.
    second_stream = mx.new_thread_local_stream(mx.cpu)

    def two_core_loss(model, x, y):
        half = len(x) // 2
        if 2 * half != len(x):  # the mean of the means of two unequal parts is not that of all
            return one_core_loss(model, x, y)
        first = one_core_loss(model, x[:half], y[:half])  # nothing is computed yet: MLX is lazy
        with mx.stream(second_stream):
            second = one_core_loss(model, x[half:], y[half:])
        return (first + second) / 2

    return two_core_loss


# Python looks a name up each time it is used. So on a CPU, make_step and evaluate, which use the
# name loss_fn, will get the two-core version. (A GPU needs no such help.)
if mx.default_device() == mx.cpu:
    loss_fn = on_two_cores(loss_fn)


# %% 13. The command line


def main():
    """Does what the command line says. Turns a UserError or an OSError into a single line."""
    parser = argparse.ArgumentParser(description="Without options: train GPT-2 on input.txt.")
    options = parser.add_mutually_exclusive_group()
    options.add_argument("--sample", metavar="TEXT", nargs="?", const="",  # without TEXT: ""
                         help="continue TEXT with the trained model (--sample=TEXT if TEXT begins "
                         "with a minus sign; another seed in train.py gives another text)")
    options.add_argument("--look", metavar="TEXT",
                         help="show what the trained model attends to and what it predicts next")
    options.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    # In Jupyter, sys.argv holds the arguments of its kernel_launcher, not ours.
    in_notebook = "kernel_launcher" in sys.argv[0]
    arguments = parser.parse_args([] if in_notebook else None)  # None: sys.argv
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has no such method
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack some of our characters
    if all_machines().rank() > 0:  # only the first machine prints
        sys.stdout = None  # then print() does nothing
    try:
        if arguments.sample is not None:
            type_out(*load_model_for(arguments.sample), arguments.sample)
        elif arguments.look is not None:
            look(*load_model_for(arguments.look), arguments.look)
        else:
            train(arguments.resume)
        print(end="", flush=True)  # the last of the text, which Python may have kept back so far
    except KeyboardInterrupt:  # Ctrl-C, perhaps in the middle of a line
        sys.exit("\ntrain.py: stopped")
    except BrokenPipeError:  # no one is reading anymore, as after: train.py --sample | head
        sys.stdout = None  # otherwise Python would try to print the rest when it exits
        sys.exit(1)
    except UnicodeDecodeError as error:
        sys.exit(f"train.py: input.txt is not UTF-8: {error}")
    except (UserError, OSError) as error:
        sys.exit(f"train.py: {error}")


def load_model_for(prompt):
    """The saved model and its tokenizer. Raises UserError if there is none, if it cannot read the
    prompt, or if a setting in SAMPLING makes no sense."""
    check_settings(SAMPLING)
    model, tokenizer = load_model(MODEL)
    try:
        tokenizer.encode(prompt)  # only to see whether it can
    except KeyError as error:  # str(error) is the character, in quotes
        known = "".join(tokenizer.vocab[:100])
        raise UserError(f"the model does not know {error}. It knows {known!r}") from None
    return model, tokenizer


if __name__ == "__main__":
    main()
