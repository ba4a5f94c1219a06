"""What `encode_images` and `generate` return: encoded images, and an answer with what it cost."""
from dataclasses import dataclass, field, replace

from model.image_tokens import ImageTokens, Tiles


@dataclass
class EncodedImages:
    """The encoded images that a question is about."""
    tiles: Tiles
    tokens: ImageTokens | None
    ms: float                                   # that encoding took
    slots: int                                  # image tokens of all tiles, used or not
    real: int                                   # image tokens of the tiles that the images fill

    def expand(self, batch: int) -> ImageTokens | None:
        """The tokens, for every sequence of a batch."""
        return None if self.tokens is None else self.tokens.expand(batch)

    def join(self, later: "EncodedImages") -> "EncodedImages":
        """These images and after them the `later` ones, as if all had been encoded at once."""
        if self.tokens is None or later.tokens is None:
            return later if self.tokens is None else self
        return EncodedImages(Tiles.cat([self.tiles, later.tiles]), self.tokens.join(later.tokens),
                             self.ms + later.ms, self.slots + later.slots, self.real + later.real)


@dataclass
class Answer:
    """The new tokens of every sequence of the batch, and what they cost."""
    tokens: list[list[int]]                     # without the stop token
    seen: list[int]                             # image tokens that the new text of each sequence can see
    kept: list[list[float]]                     # image tokens kept, of each, per cross-attention layer
    ms: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})   # of each part
    decoded: int = 0                            # tokens that decoding made, stop tokens among them
    texts: list[str] = field(default_factory=list)          # of the answers; only `Assistant` writes them
    early: list[int] = field(default_factory=list)          # sequences that a smaller model answered
    image_kv_bytes: int = 0                     # that decoding reads
    image_kv_stored: int = 0                    # more, where a pruner chooses from all of it at every step
    text_kv_bytes: int = 0
    peak_memory: int = 0                        # bytes so far, of a GPU or of the process itself; 0: unknown
    mapped_memory: int | None = None            # and, of a process, the mapped pages of files; None: unknown

    def first(self, sequences: int) -> "Answer":
        """Of a batch that holds every prompt twice: the answers of the first half."""
        return replace(self, tokens=self.tokens[:sequences], seen=self.seen[:sequences],
                       kept=self.kept[:sequences], decoded=self.decoded // 2)

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, all sequences together; 0 where every answer ended with its first token."""
        return self.decoded / self.ms["decode"] * 1000 if self.decoded else 0.0
