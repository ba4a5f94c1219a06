"""Where the model looked when it wrote each token of an answer, in every cross-attention layer and head.

    Looker(pruner) ── generate ─► looks() ─► Looks.attention(token, layer, head): on every image token

The first token is made by the last query position of the prompt (hook 2), every later one by the position of
the token before it, in a decode step (hook 4). The image tokens are those that the layer attends to in that
step: what the pruner has dropped, merged or masked counts as the model itself counts it.
N image tokens that were encoded, n that a layer attends to, H query heads, K = 1 or G sets of tokens.
"""
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries
from pruning.attention import attention_weights, every_image
from pruning.pruner import Pruner
from pruning.recorder import Recorder
from pruning.view import coords_of
from weights.tokenizer import ChatTokenizer, Detokenizer

MOST_BYTES = 2 ** 28        # of attention weights that one answer may hold; later tokens are not recorded
WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")


@dataclass
class Look:
    """The attention of one query position in one layer."""
    weights: Tensor                             # [H, n] fp32; what is masked has 0
    where: Tensor                               # [K, n] which encoded token each is; -1: masked, or none


@dataclass
class Looks:
    """What `Looker.looks` returns, for sequence 0 of the batch; of MINT it is the branch with the key set."""
    coords: Tensor                              # [N, 4] of the encoded tokens, as in ImageTokens
    steps: list[list[Look]]                     # of each token of the answer, per cross-attention layer
    owners: list[Tensor]                        # Recorder.clusters: which token stands for which, if merged

    def __len__(self) -> int:
        """The tokens of the answer that were recorded: all, unless the answer is very long. None if a smaller
        model gave the answer."""
        return len(self.steps)

    @property
    def layers(self) -> int:
        return len(self.steps[0]) if self.steps else 0

    @property
    def heads(self) -> int:
        return len(self.steps[0][0].weights) if self.steps else 0

    def attention(self, token: int, layer: int | None = None, head: int | None = None) -> Tensor:
        """Attention on each encoded token when this token of the answer was made, [N]; None: the mean.

        What a merged token gets is spread evenly over the tokens that it stands for. The sum is below 1 only
        where a pruner has added a token that is nowhere in the image, as CSP does.
        """
        return self.of_word([token], layer, head)[0]

    def of_word(self, tokens: Sequence[int], layer: int | None = None,
                head: int | None = None) -> tuple[Tensor, Tensor]:
        """The mean attention of several tokens, those of a word; and the share of these tokens, layers and
        heads in which each encoded token could be looked at: both [N]."""
        layers = range(self.layers) if layer is None else [layer]
        parts = [self._spread(self.steps[token][i], i, head) for token in tokens for i in layers]
        attention, there = (torch.stack(part).mean(0) for part in zip(*parts, strict=True))
        return attention, there

    def _spread(self, look: Look, layer: int, head: int | None) -> tuple[Tensor, Tensor]:
        """Of one look: attention on the encoded tokens, and where it could look, [N]; means over heads."""
        N = len(self.coords)
        owner = torch.arange(N)[None]
        if self.owners:
            owner = self.owners[layer if len(self.owners) > 1 else 0]                       # [1 or G, N]
        sets = max(len(owner), len(look.where))
        weights = look.weights.unflatten(0, (sets, -1))                                     # [K, H/K, n]
        owner, where = owner.expand(sets, -1), look.where.expand(sets, -1)
        if head is None:
            weights = weights.mean(1)                                                       # [K, n]
        else:
            own = [head // weights.shape[1]]
            weights, owner, where = look.weights[[head]], owner[own], where[own]
        there = here(where, N)                                                              # [K, N]
        owner = torch.where(there, torch.arange(N), owner)
        size = torch.zeros(owner.shape).scatter_add(1, owner, torch.ones(owner.shape))
        index = torch.where(where < 0, N, where)                # N: nowhere in the image
        held = torch.zeros(len(owner), N + 1).scatter_add(1, index, weights)[:, :N]
        attention = (held / size.clamp(min=1)).gather(1, owner)
        return attention.mean(0), there.gather(1, owner).float().mean(0)


def index_of(coords: Tensor, encoded: Tensor) -> Tensor:
    """Which of the encoded tokens [N, 4] has each of these coords, [K, n, 4] -> [K, n]; -1: none of them."""
    sides = encoded.amax(0) + 2                                 # row and column of a class token are -1
    steps = torch.tensor([sides[1:].prod(), sides[2:].prod(), sides[3], 1])
    numbers, order = ((encoded + 1) * steps).sum(-1).sort()                                 # [N]
    index = torch.searchsorted(numbers, ((coords + 1) * steps).sum(-1)).clamp(max=len(order) - 1)
    index = order[index]
    return torch.where((encoded[index] == coords).all(-1), index, -1)


def here(where: Tensor, tokens: int) -> Tensor:
    """Which of the encoded tokens are among these, [K, n] -> [K, N] bool."""
    marked = torch.zeros(len(where), tokens + 1, dtype=torch.bool)
    return marked.scatter(1, torch.where(where < 0, tokens, where), True)[:, :tokens]


class Looker(Recorder):
    """A Recorder that also records where the model looks; it changes no answer.

    A new answer begins anew. Attention weights are made for one query position at a time.
    """

    def __init__(self, inner: Pruner, attention: bool = False):
        super().__init__(inner, attention)
        self.steps: list[list[Look]] = []
        self.bytes = 0

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        image = super().encoded(image, prompts)
        self.steps = [[]]
        self.bytes = 0
        return image

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        image, kv = super().layer(i, queries, image, kv)
        self.look(queries, kv)
        return image, kv

    def stepped(self, step: int, queries: list[Tensor], image_kv: list[ImageKV]) -> list[ImageKV]:
        if self.bytes < MOST_BYTES and image_kv:
            self.steps.append([])
            for q, kv in zip(queries, image_kv, strict=True):
                self.look(every_image(q), kv)
        return super().stepped(step, queries, image_kv)

    def look(self, queries: Queries, kv: ImageKV):
        """Record what the last query position of sequence 0 that sees an image attends to."""
        first = kv.sequence(0)
        queries = Queries(queries.q[:1], queries.seen[:1])
        sees = queries.seen[0, :, 0] < queries.seen[0, :, 1]                                # [T]
        last = sees & (sees.cumsum(0) == sees.sum())
        for _, weights in attention_weights(queries, first, 0, last):                       # [H, 1, n]
            where = index_of(first.coords[0].cpu(), coords_of(self.image)[0])               # [K, n]
            if first.mask is not None:
                where = torch.where(first.mask[0].cpu(), where, -1)
            self.steps[-1].append(Look(weights[:, 0].cpu(), where))
            self.bytes += weights.nbytes + where.nbytes

    def looks(self, tokens: int) -> Looks:
        """Where the model looked for the first `tokens` tokens: those of the answer; the token that ends it
        is recorded too. Raises ValueError if nothing was recorded."""
        if self.image is None:
            raise ValueError("there is nothing that the model looked at: ask about an image first; a smaller "
                             "model's answer leaves nothing")
        steps = [looks for looks in self.steps[:tokens] if looks]
        return Looks(coords_of(self.image)[0], steps, self.clusters)


# ----- words


@dataclass
class Word:
    """A word, a number or punctuation of an answer."""
    text: str
    start: int                                  # in the text, in characters
    tokens: list[int]                           # the numbers of its tokens in the answer


def words_of(tokenizer: ChatTokenizer, ids: list[int]) -> tuple[str, list[Word]]:
    """The text of an answer, and its words with the tokens that they are made of.

    A token with the end of one word and the beginning of the next is of both; blanks are of no word.
    """
    detokenizer = Detokenizer(tokenizer)
    text = ""
    makers: list[list[int]] = []                # of each character, the tokens with its bytes
    waiting: list[int] = []
    for number, token in enumerate(ids):
        if tokenizer.token_bytes(token):        # special tokens have no text
            waiting.append(number)
        piece = detokenizer.push(token)
        if piece:
            text += piece
            makers += [waiting] * len(piece)
            waiting = []
    rest = detokenizer.flush()
    text += rest
    makers += [waiting] * len(rest)
    words = []
    for found in WORD.finditer(text):
        tokens = {number for own in makers[found.start():found.end()] for number in own}
        words.append(Word(found.group(), found.start(), sorted(tokens)))
    return text, words
