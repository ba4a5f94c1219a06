"""What `encode_images` and `generate` return: encoded images, and an answer with what it cost."""
from dataclasses import dataclass, field, replace

from model.image_tokens import ImageTokens, Tiles


@dataclass
class EncodedImages:
    """The encoded images that questions are about: the same for all of them, or those of each."""
    tiles: Tiles                                # of all images, in order
    tokens: ImageTokens | None                  # of 1 sequence if they are the same for all, else of B
    ms: float                                   # that encoding took
    real_of_each: list[int]                     # image tokens of the tiles that a sequence's images fill
    slots_of_each: list[int]                    # and of all tiles, used or not
    images_of_each: list[int]
    shared: bool = True                         # whether there is one set of images, for any batch

    @property
    def real(self) -> int:
        return sum(self.real_of_each)

    @property
    def slots(self) -> int:
        return sum(self.slots_of_each)

    def expand(self, batch: int) -> ImageTokens | None:
        """The tokens, for every sequence of a batch. Raises ValueError if each has its own, and there are
        more or fewer of them."""
        if not self.shared and len(self.real_of_each) != batch:
            raise ValueError(f"{batch} conversations, but images for {len(self.real_of_each)}: give one list "
                             "of images for each")
        return self.tokens.expand(batch) if self.shared and self.tokens is not None else self.tokens

    def counts(self, batch: int) -> list[int]:
        """Real image tokens of each of so many sequences."""
        return self.real_of_each * batch if self.shared else self.real_of_each

    def join(self, later: "EncodedImages") -> "EncodedImages":
        """These images and after them the `later` ones, as if all had been encoded at once. Raises ValueError
        if sequences have images of their own."""
        if not (self.shared and later.shared):
            raise ValueError("only images that are the same for all conversations can be joined")
        if self.tokens is None or later.tokens is None:
            return later if self.tokens is None else self
        return EncodedImages(Tiles.cat([self.tiles, later.tiles]), self.tokens.join(later.tokens),
                             self.ms + later.ms, [self.real + later.real], [self.slots + later.slots],
                             [len(self.tiles) + len(later.tiles)])


@dataclass
class Answer:
    """The new tokens of every sequence of the batch, and what they cost."""
    tokens: list[list[int]]                     # without the stop token
    seen: list[int]                             # image tokens that the new text of each sequence can see
    kept: list[list[float]]                     # image tokens kept, of each, per cross-attention layer
    ms: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})   # of each part
    decoded: int = 0                            # tokens that decoding made, stop tokens among them
    texts: list[str] = field(default_factory=list)          # of the answers; only `Assistant` writes these 4
    prompt_tokens: list[int] = field(default_factory=list)  # of each, template included
    limits: list[int] = field(default_factory=list)         # new tokens that each might have had
    real: list[int] = field(default_factory=list)           # image tokens of the tiles that its images fill
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
