"""GPT-2 from scratch in MLX: a tutorial in one file.

Run it:     python train.py             train on input.txt, then write some text
            python train.py --help      go on with a stopped run, or sample from a finished one

Read it from the top. Each section needs only the ones before it:

    1. Settings       5. Embeddings    9. Loss
    2. Data           6. Attention    10. Training
    3. Tokenizer      7. MLP, block   11. Sampling
    4. Batches        8. GPT          12. Conveniences, which a first reading may skip
                                      13. The run

Then change a setting and run it again.

What to expect of the validation loss, the mean over all characters that training never saw:
the default settings reach 1.25 on the shipped input.txt and 1.49 on Tiny Shakespeare (the README
tells where to get it). Without a GPU a smaller model is trained, to 1.55 and 1.77. Guessing would
cost 4.17.
"""

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
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
# All that is yours to turn. The model and its training are made from these values at the moment
# they are built, so in a notebook `train.n_emb = 32` before `train.GPT(65)` is all it takes.

# The model: larger values learn more and take longer.
ctx_len = 128        # how many characters the model sees at once
n_emb = 128          # how many numbers stand for one character inside the model
n_heads = 4          # attention heads in a block; n_emb must be a multiple of it
n_layers = 3         # blocks, one after the other
dropout = 0.03       # share of values zeroed at random in training; more if val rises above train

# The training.
num_epochs = 20      # passes over the training text
batch_size = 32      # rows of text in a training step; fewer makes more, but noisier, steps
lr = 3e-3            # peak learning rate; lower it if the loss jumps about or becomes nan
warmup_steps = 100   # steps in which the learning rate rises to its peak
weight_decay = 0.1   # pull of the weight matrices towards zero; more of it means simpler models
betas = (0.9, 0.99)  # how long AdamW remembers the gradient and its square; nearer 1 is longer
max_norm = 1.0       # a gradient longer than this is shortened to it; lower is more cautious
seed = 0             # another number, another run

# The text it writes.
max_new_tokens = 1000  # how many characters
temperature = 0.8      # 0: always the likeliest character; 1: as the model believes; more: wilder
top_k = 40             # draw among this many likeliest characters only

# Without a GPU the values above take hours. Where MLX finds none, these take their place (so these
# are the ones to edit there), and a run ends in a few minutes. In so short a time a small model
# that sees much text learns more than a large one that sees little; and as it does not see it
# often enough to learn it by heart, it needs no dropout.
if mx.default_device() == mx.cpu:
    ctx_len, n_emb, n_heads, n_layers, dropout = 48, 56, 7, 1, 0.0
    num_epochs, batch_size, lr = 3, 8, 1e-2

# ---------------------------------------------------------------------------------------------
# 2. Data
#
# One text file is all the data there is. The model never sees the last tenth in training: the
# loss on this validation text tells whether it learnt the language or only learnt by heart.


def load_text(path="input.txt"):
    """The text of a UTF-8 file, its line ends turned into newlines.

    Raises OSError if it cannot be read, UnicodeDecodeError if it is not UTF-8.
    """
    return Path(path).read_text(encoding="utf-8").removeprefix("\ufeff")  # the byte-order mark


def split(tokens):
    """The first nine tenths of tokens, to train on, and the last tenth, to validate with."""
    boundary = len(tokens) * 9 // 10
    return tokens[:boundary], tokens[boundary:]


# ---------------------------------------------------------------------------------------------
# 3. Tokenizer
#
# A network computes with numbers, so every character gets one: its place in the sorted list of
# all different characters of the text, the vocabulary. Such a number is called a token. The
# shipped input.txt has 65 different characters, and
#
#     encode("hello world") == [46, 43, 50, 50, 53, 1, 61, 53, 56, 50, 42]
#
# GPT-2 itself uses tokens of several letters, 50,257 of them. Characters make longer rows of
# simpler tokens: a tiny vocabulary, and nothing to explain.


class CharTokenizer:
    """Translates between text and tokens; the vocabulary is the set of characters of `text`."""

    def __init__(self, text):
        self.vocab = sorted(set(text))
        self.vocab_size = len(self.vocab)
        # A table from each character's Unicode number to its token, -1 where there is none. Its
        # last entry stays -1 and answers for all characters beyond the end.
        codes = [ord(c) for c in self.vocab]
        self._token_of = np.full(max(codes) + 2, -1)
        self._token_of[codes] = np.arange(self.vocab_size)

    def encode(self, text):
        """A string to a list of ints. Raises ValueError at a character outside the vocabulary."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        tokens = self._token_of[np.minimum(codes, len(self._token_of) - 1)]
        if (tokens < 0).any():
            raise ValueError(f"the character {text[tokens.argmin()]!r} is not in the vocabulary")
        return tokens.tolist()

    def decode(self, ids):
        """Tokens, any iterable of ints, to a string."""
        return "".join(self.vocab[i] for i in ids)


# ---------------------------------------------------------------------------------------------
# 4. Batches
#
# The model learns one thing: given the characters so far, which one is next? So the labels are
# the text itself, shifted by one. The shipped text begins with "First Citizen:", whose first
# nine tokens are 18 47 56 57 58 1 15 47 58. With rows of T = 8 that makes
#
#     x = 18 47 56 57 58  1 15 47        F i r s t _ C i
#     y = 47 56 57 58  1 15 47 58        i r s t _ C i t
#
# One row of T characters holds T training examples: after "F" comes "i", after "Fi" comes "r",
# and so on to "First Ci", after which comes "t". The model answers all T at once.
#
# A batch is B rows that know nothing of each other. They go through the model side by side as
# one array (B, T): the machine is kept busy, and the step follows the average of many examples
# instead of the whim of one.


def count_batches(tokens, batch_size):
    """Full batches in a training epoch; one chunk is spent on the random offset."""
    return (len(tokens) // ctx_len - 1) // batch_size


def get_batches(tokens, batch_size, shuffle):
    """Yields (x, y), integer arrays (B, T), where y holds the token that follows each of x.

    With shuffle=True, for training, the text is cut into chunks of ctx_len tokens from a random
    offset, so that every epoch cuts it elsewhere, and the chunks come in random order. No token
    is a label twice. All batches are full, count_batches of them; the rest is left out.

    With shuffle=False, for evaluation, every token but the first is a label exactly once, in
    order. The last full-width batch can have fewer rows, and what then remains of the text,
    shorter than ctx_len, comes as a last batch of one row.
    """
    tokens = np.asarray(tokens, dtype=np.int32)
    if shuffle:
        starts = np.random.permutation(len(tokens) // ctx_len - 1) * ctx_len
        starts = starts[: count_batches(tokens, batch_size) * batch_size]
        starts += np.random.randint(ctx_len)
    else:
        starts = np.arange((len(tokens) - 1) // ctx_len) * ctx_len
    for i in range(0, len(starts), batch_size):
        rows = starts[i : i + batch_size, None] + np.arange(ctx_len)  # (B, T), places in the text
        yield mx.array(tokens[rows]), mx.array(tokens[rows + 1])
    rest = len(starts) * ctx_len
    if not shuffle and rest < len(tokens) - 1:
        yield mx.array(tokens[None, rest:-1]), mx.array(tokens[None, rest + 1 :])


# ---------------------------------------------------------------------------------------------
# 5. Embeddings
#
# A token's number is only a name: 43 is not more than 18. To compute with it, the model keeps a
# table with one row of n_emb numbers for every token, an embedding, and looks the row up. The
# rows start at random and are learnt like everything else in the model; characters that behave
# alike, vowels for example, end up with similar rows. Looking up (B, T) tokens in this table,
# which GPT-2 calls wte, gives (B, T, n_emb) numbers.
#
# Attention, the next section, takes the characters before a place as a bag without order. To
# it, "on" and "no" would be the same. So a second table, wpe, has a row for each position from
# 0 to ctx_len - 1, and the two rows are added. Now each vector says what stands there and where.
# This is also why ctx_len is a limit: there is no row for a position beyond it.

# ---------------------------------------------------------------------------------------------
# 6. Attention
#
# So far each position knows only its own character. To guess the next one it has to look back.
# The simplest way is to take the average of all vectors up to its own, which a matrix with zeros
# above the diagonal does for all positions at once. For three of them:
#
#     1    0    0
#     1/2  1/2  0
#     1/3  1/3  1/3
#
# The zeros are a must. At every position the next character is the answer to be found, and a
# model that may look at it learns to copy instead of to predict.
#
# The same matrix can be had from softmax, which turns any scores s into weights that are
# positive and sum to 1: exp(s_i) / sum_j exp(s_j). Equal scores get equal weights, and a score
# of -inf gets none, as exp(-inf) = 0:
#
#     softmax(0, -inf, -inf) = 1    0    0
#     softmax(0,    0, -inf) = 1/2  1/2  0
#     softmax(0,    0,    0) = 1/3  1/3  1/3
#
# So averaging the past is softmax(scores + mask), with scores of 0 and a mask that holds -inf
# above the diagonal. Attention is the same with scores that depend on what is there. From its
# vector each position makes three others, by three learnt matrices:
#
#     the query   what I am looking for
#     the key     what I have to offer
#     the value   what I pass on to those who look at me
#
# The score that position t gives to position s is the dot product of t's query and s's key:
# large if they point the same way. A "q" may ask "which word am I in?" and be answered by the
# last space. What t takes home is the average of the values, weighted by softmax of its scores.
#
# Why divide the scores by sqrt(head_size), the square root of the length of query and key? A
# dot product of 32 pairs of random numbers of variance 1 has variance 32, so it is typically as
# large as sqrt(32) = 5.7. softmax(5.7, 0) = (0.997, 0.003) has made up its mind before learning
# began, and as nothing changes when the scores change a little, there is no gradient to learn
# from. Divided, it is softmax(1, 0) = (0.73, 0.27).
#
# Why several heads? One head takes one average, and can look for one kind of thing. n_heads of
# them, each with queries, keys and values of head_size = n_emb // n_heads numbers, look for
# several kinds at the same cost. It takes no loop: the n_emb numbers are reshaped to (n_heads,
# head_size), and the axis of heads is moved next to that of the batch. A matrix product works on
# the last two axes and repeats for all before them, so each head in each row goes its own way.
#
# (Vaswani et al., Attention Is All You Need, 2017)


class MultiHeadAttention(nn.Module):
    """Causal self-attention, (B, T, n_emb) to (B, T, n_emb). n_emb is a multiple of n_heads."""

    def __init__(self):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(n_emb, n_emb, bias=False)
        self.k_proj = nn.Linear(n_emb, n_emb, bias=False)
        self.v_proj = nn.Linear(n_emb, n_emb, bias=False)
        self.c_proj = nn.Linear(n_emb, n_emb)
        # Dropout sets a random share of its input to zero and scales up the rest. What may be
        # missing at any time cannot be relied on alone, so knowledge is spread, and less is
        # learnt by heart. It works in training only; model.eval() switches it off.
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)
        # A column (ctx_len, 1) against a row (ctx_len,): both are broadcast, that is repeated,
        # to (ctx_len, ctx_len), and every position is compared with every other. The underscore
        # tells MLX that this is no parameter to be trained.
        position = mx.arange(ctx_len)
        self._mask = mx.where(position[:, None] < position, -mx.inf, 0.0)  # (ctx_len, ctx_len)

    def __call__(self, x, cache=None):
        """x is (B, T, n_emb). A cache, [keys, values] of S - T earlier positions, is extended."""
        B, T, n_emb = x.shape

        def split_heads(z):
            z = z.reshape(B, T, self.n_heads, -1)  # (B, T, n_heads, head_size)
            return z.transpose(0, 2, 1, 3)  # (B, n_heads, T, head_size)

        q = split_heads(self.q_proj(x))  # (B, n_heads, T, head_size)
        k = split_heads(self.k_proj(x))  # (B, n_heads, T, head_size)
        v = split_heads(self.v_proj(x))  # (B, n_heads, T, head_size)

        # In training there is no cache, and S = T: positions look at those of their own row.
        # Section 11 generates one character at a time and keeps what earlier ones have offered.
        if cache is not None:
            k = cache[0] = mx.concatenate([cache[0], k], axis=2)  # (B, n_heads, S, head_size)
            v = cache[1] = mx.concatenate([cache[1], v], axis=2)  # (B, n_heads, S, head_size)
        S, head_size = k.shape[2:]

        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(head_size)  # (B, n_heads, T, S)
        scores = scores + self._mask[S - T : S, :S]  # one (T, S) for all rows and heads
        weights = self.attn_dropout(mx.softmax(scores, axis=-1))
        out = weights @ v  # (B, n_heads, T, head_size)
        out = out.transpose(0, 2, 1, 3).reshape(B, T, n_emb)  # (B, T, n_emb), heads side by side
        return self.resid_dropout(self.c_proj(out))  # (B, T, n_emb), and the heads mixed


# ---------------------------------------------------------------------------------------------
# 7. MLP and block
#
# Attention gathers; the MLP, a "multi-layer perceptron", digests. It treats every position by
# itself: out to four times the width, through a function that bends, and back. Without the bend
# two matrices in a row would do no more than one. GPT-2 bends with GELU, x times the share of
# the normal distribution below x: nearly 0 far below zero, nearly x far above, smooth between.
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


# A block is one round of gathering and digesting, and two inventions that let blocks be stacked.
#
# Residual connections: what attention and MLP compute is added to x and does not replace it. A
# block has to learn only what to change. And a sum hands the gradient on to both its parts as it
# is, so it reaches the first block as strong as the last, however many stand between.
# (He et al., Deep Residual Learning, 2015)
#
# LayerNorm: each token's n_emb numbers are shifted and scaled to mean 0 and variance 1, then
# multiplied by a learnt gain and moved by a learnt bias. Each token by itself: no other position
# and no other row of the batch plays a part. It keeps the numbers in the range where the layers
# after it work well. As in GPT-2 it stands before attention and MLP, so that the path of x
# itself, from the embedding to the end, is nothing but additions.
# (Ba et al., Layer Normalization, 2016)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a residual connection."""

    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_emb)
        self.mha = MultiHeadAttention()
        self.ln_2 = nn.LayerNorm(n_emb)
        self.mlp = MLP()

    def __call__(self, x, cache=None):
        x = x + self.mha(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


# ---------------------------------------------------------------------------------------------
# 8. GPT
#
# The whole model: look up the embeddings, go through the blocks, and turn each position's final
# vector into vocab_size scores, the logits. The larger a token's logit, the more the model
# believes that it comes next; softmax makes probabilities of them.
#
# All numbers in it that training changes are its parameters: with the settings at the top and 65
# characters, 627,009. GPT-2 in its smallest size has 124 million, with n_emb = 768, 12 heads,
# 12 layers, ctx_len = 1024 and 50,257 tokens.
# (Radford et al., Language Models are Unsupervised Multitask Learners, 2019)


class GPT(nn.Module):
    """model(x) maps (B, T) tokens to (B, T, vocab_size) logits, for any T up to ctx_len."""

    def __init__(self, vocab_size):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_emb)
        self.wpe = nn.Embedding(ctx_len, n_emb)
        self.dropout = nn.Dropout(dropout)
        self.blocks = [Block() for _ in range(n_layers)]
        self.ln_f = nn.LayerNorm(n_emb)
        self.lm_head = nn.Linear(n_emb, vocab_size)
        self.update(tree_map_with_path(self._initial, self.parameters()))

    def _initial(self, name, weight):
        # GPT-2's initialisation: small random numbers, so that all logits start near 0 and no
        # character is preferred. A block's two c_proj layers add to x, which makes 2 * n_layers
        # additions; drawn smaller by the root of their number, they keep the sum's size.
        if weight.ndim == 1:  # biases start at 0, the gains of LayerNorm at 1
            return mx.zeros_like(weight) if name.endswith("bias") else mx.ones_like(weight)
        std = 0.02 / math.sqrt(2 * n_layers) if name.endswith("c_proj.weight") else 0.02
        return mx.random.normal(weight.shape, scale=std)

    def __call__(self, x, cache=None):
        """x is (B, T). A cache holds one [keys, values] for each block, see section 11.

        Raises ValueError if cache and x together are longer than ctx_len.
        """
        B, T = x.shape
        start = 0 if cache is None else cache[0][0].shape[2]  # the position of x's first token
        if start + T > len(self.wpe.weight):
            raise ValueError(f"{start + T} tokens are more than ctx_len = {len(self.wpe.weight)}")
        x = self.wte(x) + self.wpe(mx.arange(start, start + T))  # (B, T, n_emb) + (T, n_emb)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i])
        return self.lm_head(self.ln_f(x))  # (B, T, vocab_size)


# ---------------------------------------------------------------------------------------------
# 9. Loss
#
# How wrong was the model? Of the probabilities that softmax makes of a position's logits, only
# the one given to the character that really came counts: the loss is minus its natural
# logarithm, averaged over all positions. This is the cross-entropy, in nats per character.
# Certain and right costs -ln 1 = 0; the less expected the truth, the higher the price.
#
# Pure guessing gives each of 65 characters the probability 1/65 and costs ln 65 = 4.17. A new
# model knows nothing, so its first loss must be close to that: if it is not, something is wrong.
# A loss of 1.5 means being as unsure as between exp(1.5) = 4.5 equally likely characters.


def loss_fn(model, x, y):
    """Mean cross-entropy in nats per character (a scalar array) of labels y, given x: (B, T)."""
    return nn.losses.cross_entropy(model(x), y, reduction="mean")


# ---------------------------------------------------------------------------------------------
# 10. Training
#
# Training is one step, over and over: take a batch, compute the loss and its gradient, that is for
# each parameter how the loss would change if the parameter grew a little, and move every
# parameter a little the other way.
#
# Three things about MLX. First, it is lazy: an operation only notes down what is to be computed,
# and the work is done when somebody needs the result or calls mx.eval. Second, it transforms
# functions. PyTorch's loss.backward() leaves gradients behind in the parameters; here
# nn.value_and_grad makes of loss_fn a new function, which returns the loss and, in a tree of the
# same shape as the parameters, its gradient for each. Third, mx.compile records a function once,
# joins small operations into larger ones, and runs the recording from then on. What the step
# changes besides its return value it must be told: the state.


def make_optimizer(total_steps):
    """AdamW for a training of total_steps steps (Loshchilov and Hutter, 2019).

    Adam divides a running mean of each parameter's gradient by the root of a running mean of its
    square, so that all parameters move at a similar pace. The W is for weight decay: each step
    also shrinks the weights by a small share, and only those that keep earning it stay large.

    The rule: the weight matrices of the linear layers decay. Biases and gains do not, as they
    set levels, for which 0 is no better than another. Nor do the two embedding tables: a row is
    only used when its character comes, and a rare one would fade in between.
    """

    def learning_rate(step):
        # Up to lr in warmup_steps, while the running means settle, and all the way down to 0
        # over the run: large strides first, small ones to come to rest at the bottom.
        return lr * mx.minimum(1, (step + 1) / max(1, warmup_steps)) * (1 - step / total_steps)

    def decays(name, weight):
        return weight.ndim == 2 and not name.startswith(("wte", "wpe"))

    adamw = partial(optim.AdamW, learning_rate, list(betas), bias_correction=True)
    return optim.MultiOptimizer([adamw(weight_decay=weight_decay), adamw(weight_decay=0)], [decays])


def evaluate(model, tokens):
    """The mean loss over all of tokens but the first, which nothing precedes; without dropout."""
    world = mx.distributed.init()
    model.eval()  # evaluation mode: dropout does nothing
    total, count = mx.array(0.0), 0
    for i, (x, y) in enumerate(get_batches(tokens, batch_size, shuffle=False)):
        if i % world.size() == world.rank():
            total = total + loss_fn(model, x, y) * y.size  # a short batch weighs less
            count += y.size
            mx.eval(total)
    model.train()  # training mode again
    total, count = mx.distributed.all_sum(mx.stack([total, mx.array(float(count))])).tolist()
    return total / count


def train(model, optimizer, train_tokens, val_tokens, first_epoch=0, loss_fn=loss_fn):
    """Trains model in place; yields (epoch, train loss, validation loss) after each epoch.

    What it minimises may also be another function with the arguments of loss_fn. Raises
    FloatingPointError if the loss is no longer a finite number.
    """
    # Started by mlx.launch, several processes train together (alone, size is 1 and rank 0). All
    # have the same model, take every size-th row of each batch and average their gradients. As
    # the loss is a mean over rows, the mean of the gradients of two half batches is the gradient
    # of the whole batch: every process takes the very step that one alone would have taken.
    world = mx.distributed.init()
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x, y):
        loss, grads = loss_and_grad(model, x, y)
        grads = nn.average_gradients(grads)
        # One odd batch can have a gradient that would throw the model far off. Keep its
        # direction, but limit its length.
        grads, _ = optim.clip_grad_norm(grads, max_norm)
        optimizer.update(model, grads)
        return loss

    for epoch in range(first_epoch, num_epochs):
        # Chance starts afresh in each epoch: the order of the text the same in all processes and
        # after --resume, dropout different in each process.
        np.random.seed([seed, epoch])
        mx.random.seed(np.random.randint(2**31) + world.rank())
        losses = []
        for x, y in get_batches(train_tokens, batch_size, shuffle=True):
            losses.append(step(x[world.rank() :: world.size()], y[world.rank() :: world.size()]))
            # Start computing, and let Python prepare the next batch meanwhile.
            mx.async_eval(losses[-1], state)
            if sys.stdout.isatty() and len(losses) % 10 == 0:
                done = f"step {len(losses)} of {count_batches(train_tokens, batch_size)}"
                print(f"\rEpoch {epoch}, {done}, loss {losses[-1].item():.4f}", end="", flush=True)
        losses = np.array(mx.distributed.all_sum(mx.stack(losses)) / world.size())
        if not np.isfinite(losses).all():
            bad = np.isfinite(losses).argmin()
            raise FloatingPointError(f"the loss is {losses[bad]} in epoch {epoch}, step {bad}")
        yield epoch, losses.mean().item(), evaluate(model, val_tokens)


# ---------------------------------------------------------------------------------------------
# 11. Sampling
#
# To write, ask the trained model for the next character, append it, and ask again. Taking the
# likeliest each time soon runs in circles, so draw one at random, with the probabilities that
# the model gives. Dividing the logits by a temperature first makes it bolder or more careful:
# below 1 the likely become likelier still, above 1 all move closer together. top_k bars the long
# tail of unlikely characters, any of which could derail what follows.


def sample(logits, temperature=1.0, top_k=None):
    """Draws a token, an int, from logits (vocab_size,). temperature=0 takes the likeliest."""
    if temperature == 0:
        return mx.argmax(logits).item()
    candidates = mx.argsort(-logits)[:top_k]  # (top_k,) tokens, the likeliest first
    choice = mx.random.categorical(logits[candidates] / temperature)
    return candidates[choice].item()


# Running the whole text through the model for every new character repeats nearly all the work.
# A position looks only at earlier ones, so nothing that comes later can change its keys and
# values, in any block: once computed, they can be kept. With this key/value cache a new character
# costs the forward pass of one token: its query looks at all the kept keys. It needs no mask, as
# what it must not see does not exist yet (its row of the mask is all zeros).
#
# When all ctx_len positions are taken, the last half of them is read in again at the front of an
# empty cache, since wpe ties the kept keys and values to their old positions.


def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None):
    """Yields max_new_tokens tokens that continue ids, a list of at least one, as they are made."""
    model.eval()
    limit, n_emb = model.wpe.weight.shape
    heads = model.blocks[0].mha.n_heads

    def empty_cache():
        nothing = mx.zeros((1, heads, 0, n_emb // heads))  # keys or values of no positions yet
        return [[nothing, nothing] for _ in model.blocks]

    context = new = list(ids)[-limit:]
    cache = empty_cache()
    for _ in range(max_new_tokens):
        logits = model(mx.array([new]), cache)[0, -1]  # (vocab_size,), those of the last token
        token = sample(logits, temperature, top_k)
        yield token
        context, new = context + [token], [token]
        if len(context) > limit:
            context = new = context[-max(1, limit // 2) :]
            cache = empty_cache()


GPT.generate = generate  # from here on, model.generate(ids, 100)


def write(model, tokenizer, ids):
    """Streams a continuation of the tokens ids to the screen as it is made, and returns it."""
    mx.random.seed(seed)
    text = ""
    for token in model.generate(ids, max_new_tokens, temperature, top_k):
        text += tokenizer.decode([token])
        print(text[-1], end="", flush=True)
    print()
    return text


# ---------------------------------------------------------------------------------------------
# 12. Conveniences
#
# Nothing new is learnt here. This section keeps the model in files, so that a run can be stopped
# and continued and its model used again, and says in one line what is wrong when it is.

ARCHITECTURE = "ctx_len n_emb n_heads n_layers".split()  # what the weights were made for
TRAINING = "dropout num_epochs batch_size lr warmup_steps weight_decay betas max_norm".split()
SAMPLING = "max_new_tokens temperature top_k seed".split()
MODEL, CHECKPOINT = "model.safetensors", "checkpoint.safetensors"


def stop(message, status=2):
    """Ends the script with one line on stderr and an exit status that says that it failed."""
    print(f"train.py: {message}", file=sys.stderr)
    raise SystemExit(status)


def check_settings():
    """Stops at the first setting with which nothing can be trained or sampled."""
    rules = [
        ("ctx_len n_emb n_heads n_layers num_epochs batch_size max_new_tokens top_k",
         lambda v: isinstance(v, int) and v >= 1, "a whole number of at least 1"),
        ("warmup_steps seed", lambda v: isinstance(v, int) and 0 <= v < 2**32,
         "a whole number of at least 0"),
        ("lr max_norm", lambda v: 0 < v < math.inf, "more than 0"),
        ("weight_decay temperature", lambda v: 0 <= v < math.inf, "at least 0"),
        ("dropout", lambda v: 0 <= v < 1, "at least 0 and less than 1"),
        ("betas", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers from 0 to 1"),
    ]
    for names, is_fine, wanted in rules:
        for name in names.split():
            if not is_fine(globals()[name]):
                stop(f"{name} = {globals()[name]} must be {wanted}")
    if n_emb % n_heads:
        stop(f"n_emb = {n_emb} must be a multiple of n_heads = {n_heads}")


def load_tokens():
    """The tokenizer and all tokens of input.txt; stops if it cannot be trained on."""
    try:
        text = load_text()
    except UnicodeDecodeError as error:
        stop(f"input.txt is not UTF-8 text: it goes wrong at byte {error.start}")
    # The training part must hold a batch of chunks and one chunk more, see count_batches.
    needed = max(20, -(-(batch_size + 1) * ctx_len * 10 // 9))
    if len(text) < needed:
        stop(f"input.txt has {len(text)} characters; ctx_len = {ctx_len} and batch_size = "
             f"{batch_size} need at least {needed}")
    tokenizer = CharTokenizer(text)
    if tokenizer.vocab_size == 1:
        stop(f"input.txt holds only one distinct character, {text[0]!r}: nothing to learn there")
    return tokenizer, np.array(tokenizer.encode(text), dtype=np.int32)


def save(path, tree, tokenizer, history):
    """Writes a safetensors file, whole or not at all: under another name, which is then changed.

    The metadata are JSON: vocab, constants, history of all losses, epoch and loss (the last).
    """
    constants = {name: globals()[name] for name in ARCHITECTURE + TRAINING + SAMPLING}
    metadata = {"vocab": "".join(tokenizer.vocab), "constants": constants, "history": history,
                "epoch": len(history) - 1, "loss": history[-1][1]}
    temporary = path.replace(".safetensors", ".tmp.safetensors")
    try:
        mx.save_safetensors(temporary, dict(tree_flatten(tree)),
                            {name: json.dumps(value) for name, value in metadata.items()})
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        stop(f"cannot write {path}, which is as it was before: {error}")
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(path):
    """The arrays and the decoded metadata that save() wrote. Stops if the file holds no such."""
    if not Path(path).is_file():
        stop(f"there is no {path} in this folder: python train.py makes one")
    try:
        arrays, metadata = mx.load(path, return_metadata=True)
        return arrays, {key: json.loads(metadata[key]) for key in "vocab constants history".split()}
    except (RuntimeError, KeyError, ValueError):
        stop_at_damage(path)


def unpack(path, arrays, like):
    """The arrays of a file as a tree. Stops unless they have the names and shapes of like's."""
    wanted = {name: array.shape for name, array in tree_flatten(like)}
    if {name: array.shape for name, array in arrays.items()} != wanted:
        stop_at_damage(path)
    return tree_unflatten(list(arrays.items()))


def stop_at_damage(path):
    """Stops because the file is not, or no longer, what save() writes."""
    stop(f"{path} is damaged, or was not written by this script")


def resume(model, optimizer, tokenizer, steps_per_epoch):
    """Puts the checkpoint into model and optimizer, and returns its history of losses."""
    arrays, metadata = load(CHECKPOINT)
    for name in ARCHITECTURE:
        then, now = metadata["constants"][name], globals()[name]
        if then != now:
            stop(f"{CHECKPOINT} was saved with {name} = {then}, now it is {now}: set it back, "
                 "or train without --resume")
    if metadata["vocab"] != "".join(tokenizer.vocab):
        stop(f"input.txt has other characters than when {CHECKPOINT} was saved")
    tree = unpack(CHECKPOINT, arrays, {"model": model.parameters(), "optimizer": optimizer.state})
    model.update(tree["model"])
    optimizer.state = tree["optimizer"]
    for part in optimizer.state["states"]:  # the schedule goes on, even if batch_size has changed
        part["step"] = mx.array(len(metadata["history"]) * steps_per_epoch, dtype=mx.uint64)
    return metadata["history"]


def sample_from_file(prompt):
    """Streams text that continues prompt, by the model and the constants in its file."""
    arrays, metadata = load(MODEL)
    globals().update({name: metadata["constants"][name] for name in ARCHITECTURE + TRAINING})
    check_settings()
    tokenizer = CharTokenizer(metadata["vocab"])
    model = GPT(tokenizer.vocab_size)
    model.update(unpack(MODEL, arrays, model.parameters()))
    try:
        ids = tokenizer.encode(prompt)
    except ValueError as error:
        stop(error)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # let `train.py --sample | head` end quietly
    print(prompt, end="", flush=True)
    write(model, tokenizer, ids)


def loss_on_streams(streams, model, x, y):
    """What loss_fn gives, computed by streams that share the rows of the batch equally.

    MLX does the work of a stream on one processor core, so two streams keep two cores busy.
    """
    losses = []
    for i, stream in enumerate(streams):
        with mx.stream(stream):
            losses.append(loss_fn(model, x[i :: len(streams)], y[i :: len(streams)]))
    return sum(losses) / len(streams)


def draw_curve(name, losses):
    """Prints losses, at least one, as a row of blocks, the lowest loss as the lowest block."""
    low, high = min(losses), max(losses)
    blocks = "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1))] for v in losses)
    print(f"{name:>5} {losses[0]:.4f} {blocks} {losses[-1]:.4f}")


# ---------------------------------------------------------------------------------------------
# 13. The run
#
# All of it put together: the text to tokens, a new model, the training, and some text at the end.


def train_and_write(resuming):
    """The whole run: reads input.txt, trains, saves after each epoch, and writes some text."""
    world = mx.distributed.init()
    if world.rank() > 0:  # of several processes only the first talks, and hears Ctrl-C
        sys.stdout = open(os.devnull, "w")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if mx.default_device() == mx.cpu:
        print(f"MLX finds no GPU here, so this is the small model: ctx_len {ctx_len}, n_emb "
              f"{n_emb}, n_layers {n_layers}, batch_size {batch_size}, num_epochs {num_epochs}.")
        # Look less far ahead for work than MLX would, which keeps fewer results waiting.
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "8")
    check_settings()
    if batch_size % world.size():
        if world.rank() > 0:
            raise SystemExit  # saying it once is enough
        stop(f"batch_size = {batch_size} must be a multiple of the {world.size()} processes")
    tokenizer, tokens = load_tokens()
    tempfile.TemporaryFile(dir=".").close()  # better to fail now than after the first epoch

    train_tokens, val_tokens = split(tokens)
    mx.random.seed(seed)
    model = GPT(tokenizer.vocab_size)
    steps_per_epoch = count_batches(train_tokens, batch_size)
    optimizer = make_optimizer(num_epochs * steps_per_epoch)
    optimizer.init(model.trainable_parameters())
    history = resume(model, optimizer, tokenizer, steps_per_epoch) if resuming else []
    n_parameters = sum(weight.size for _, weight in tree_flatten(model.parameters()))
    print(f"{len(tokens):,} characters, {tokenizer.vocab_size} different ones; "
          f"{n_parameters:,} parameters", flush=True)

    loss = loss_fn
    if mx.default_device() == mx.cpu and batch_size // world.size() % 2 == 0:  # use two cores
        loss = partial(loss_on_streams, [mx.new_stream(mx.cpu), mx.new_stream(mx.cpu)])
    started, first_epoch = time.perf_counter(), len(history)
    try:
        for epoch, *losses in train(model, optimizer, train_tokens, val_tokens, first_epoch, loss):
            history.append(losses)
            seconds = (time.perf_counter() - started) / (epoch + 1 - first_epoch)
            left = round(seconds * (num_epochs - epoch - 1))
            print("\r\033[K" * sys.stdout.isatty() + f"Epoch {epoch} | train = {losses[0]:.4f} | "
                  f"val = {losses[1]:.4f} | {len(train_tokens) / seconds:,.0f} characters/s | "
                  f"{left // 60}:{left % 60:02} left", flush=True)
            if world.rank() == 0:
                if losses[1] == min(val for _, val in history):
                    save(MODEL, model.parameters(), tokenizer, history)
                tree = {"model": model.parameters(), "optimizer": optimizer.state}
                save(CHECKPOINT, tree, tokenizer, history)
    except KeyboardInterrupt:
        saved = f"Epochs 0 to {len(history) - 1} are saved: --resume goes on from there"
        stop(f"stopped. {saved if history else 'No epoch was finished, nothing is saved'}", 130)

    for name, losses in zip(("train", "val"), zip(*history)):
        draw_curve(name, losses)
    if world.rank() == 0:
        newline = tokenizer.encode("\n" if "\n" in tokenizer.vocab else tokenizer.vocab[0])
        Path("completions.txt").write_text(write(model, tokenizer, newline), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description="Train GPT-2 on input.txt and let it write. "
                                     "All settings are constants at the top of train.py.")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help=f"go on with the run in {CHECKPOINT}")
    group.add_argument("--sample", metavar="PROMPT", nargs="?", const="\n",
                       help=f"continue PROMPT, or a new line, with the model in {MODEL}")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    try:
        if arguments.sample is None:
            train_and_write(arguments.resume)
        else:
            sample_from_file(arguments.sample or "\n")
    except FloatingPointError as error:
        stop(f"{error}: lower lr = {lr}")
    except OSError as error:
        stop(f"cannot use {error.filename}: {error.strerror}")
    except KeyboardInterrupt:  # while writing; in training it is met above
        stop("stopped", 130)


if __name__ == "__main__":
    main()
