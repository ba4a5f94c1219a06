"""Ask Llama-3.2-Vision about an image: `python generate.py --image x.png --prompt "What is this?"`.

    image ──── ImageProcessor ─► Tiles ── encode ─► ImageTokens ─┐
    question ─ ChatTokenizer ──► token ids ─────────────────────┴ prefill ─► logits ─ sample ─► token ─► text
                                                                                 ▲                │
                                                                                 └──── decode ◄───┘

`generate` is that loop, with the hooks at which a pruner may act; read it first. `Assistant` holds the parts
of a checkpoint. The command line is in cli/ask.py: answers on stdout, everything about them on stderr.
"""
from cli import program

program.begin(__name__)

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from cli.ask import arguments, ask
from model.answer import Answer, EncodedImages
from model.cache import Cache
from model.clock import Clock
from model.image_tokens import ImageTokens, Tiles, kv_bytes
from model.llama_vision import LlamaVision
from model.sampling import GREEDY, Sampler, Transcript, limits_of
from pruning import Pruner, check_pruner
from pruning.on_device import on_device
from pruning.over_ranks import over_ranks
from weights import load_model, parse_devices, parse_dtype
from weights.adapter_file import find_adapters, text_folder
from weights.adapters import find_base
from weights.guard import MOST_TOKENS, Guard, Verdict
from weights.images import ImageProcessor
from weights.messages import quoted
from weights.peak import PeakMemory
from weights.policy import Policy
from weights.progress import Progress, silent, tracked_decoder, tracked_encoder
from weights.quantized_layers import check_quantize
from weights.ranks import Ranks
from weights.room import check_answer
from weights.stop_texts import StopTexts
from weights.tokenizer import ChatTokenizer, messages

WARM_UP_TOKENS = 5          # the first steps of a CUDA graph are not its fast ones


def no_one(sequence: int, token: int):
    """The `emit` of those who do not watch."""


@torch.inference_mode()
def generate(model: LlamaVision, prompts: list[list[int]], image: ImageTokens | None,
             max_new_tokens: int | Sequence[int], stop_ids: tuple[int, ...],
             sample: Callable[[Tensor], Tensor] = GREEDY,
             emit: Callable[[int, int], bool | None] = no_one, pruner: Pruner | None = None,
             decode: Callable[[Tensor, Cache], Tensor] | None = None) -> Answer:
    """Continue every prompt to a stop token or `max_new_tokens`; new tokens go to `emit(sequence, token)`,
    which may end an answer by returning True. `max_new_tokens` is one number, or one for each prompt.

    `image` is what `model.encode` made of the images; `decode` is `model.decode` if not given, or Compiled of
    it. Raises ValueError if a prompt does not fit, or the pruner's options do not fit the model.
    """
    model.check_prompts(prompts, max_new_tokens)
    limits = limits_of(max_new_tokens, len(prompts))                                # [B]
    check_pruner(pruner, image)
    ids, lengths = model.pad_right(prompts)                                         # [B, T]
    seen = model.tokens_seen(ids, lengths, image)
    if pruner is None or pruner.keeps_all or image is None:
        pruner = Pruner()                                                           # keeps everything
    decode = decode or model.decode
    clock = Clock(ids.device)
    pruner.begin(model)
    if image is not None:
        image = pruner.encoded(image, prompts)                                      # hook 1
    logits, cache = model.prefill(ids, lengths, image, max(limits), pruner)         # hook 2
    cache.image_kv = pruner.prefilled(cache.image_kv)                               # hook 3
    kept = cache.kept()
    ms = {"prefill": clock.lap()}
    transcript = Transcript(len(prompts), stop_ids, emit, ids.device, limits)
    for step in range(max(limits)):
        logits = pruner.logits(logits)                                              # hook 5
        tokens = sample(logits)                                                     # [B]
        transcript.push(tokens, logits)
        if transcript.ended or step + 1 == max(limits):
            break
        logits = decode(tokens, cache)                                              # [B, V]
        cache.image_kv = pruner.stepped(step, cache.queries, cache.image_kv)        # hook 4
    transcript.finish()
    ms["decode"] = clock.lap()
    return Answer(transcript.tokens, seen, kept, ms, transcript.decoded,
                  image_kv_bytes=cache.image_bytes(), text_kv_bytes=cache.text_bytes(),
                  image_kv_stored=kv_bytes(cache.image_kv + pruner.stored))


class Assistant:
    """A checkpoint ready to answer: the model, its prompt format and its image processing."""

    def __init__(self, source: str, device: str | None = None, dtype: str | None = None,
                 revision: str | None = None, compile: bool = False, adapters: Sequence[str | Path] = (),
                 offload: bool = False, quantize: str | None = None, progress: Progress = silent,
                 ranks: Ranks | None = None):
        began = time.perf_counter()
        self.ranks = ranks or Ranks()
        self.devices = parse_devices(self.ranks.device or device)       # all before a long download
        dtype = parse_dtype(dtype)
        check_quantize(quantize, self.devices[0], dtype)
        if compile and (offload or len(self.devices) > 1):
            raise ValueError("the decode step can only be compiled where all weights are on one device: "
                             "leave out compiling, offloading or the other devices")
        self.adapters = find_adapters(adapters)     # small downloads before a large one
        folder = self.folder = find_base(source, revision, self.adapters)
        self.progress = progress
        self.peak = PeakMemory()
        with self.peak:
            self.model = load_model(folder, device, dtype, adapters=self.adapters, offload=offload,
                                    quantize=quantize, progress=progress, ranks=ranks)
        self.tokenizer = ChatTokenizer.from_folder(folder, self.model.config, text_folder(self.adapters))
        self.processor = ImageProcessor.from_folder(folder, self.model.config.vision)
        self.decode = self.model.decode
        if compile:                             # imported here: a compiler takes seconds to import
            from model.compiled import Compiled
            self.decode = Compiled(self.model.decode, self.model.device)
        self.ms = {"load": (time.perf_counter() - began) * 1000}

    def encode_images(self, images: list[Image.Image] | list[list[Image.Image]],
                      pruner: Pruner | None = None, keep_states: bool = False) -> EncodedImages:
        """Encode RGB images, once for any number of questions; or, from a list of lists, those of each
        conversation of a batch, which may have none. `pruner` may shrink them first; states of the encoder
        are kept if it needs them, or with `keep_states`."""
        if pruner is None or pruner.keeps_all:
            pruner = Pruner()
        config = self.model.config.vision
        sequences, shared = sequences_of(images)
        keys = [tuple(map(id, own)) for own in sequences]
        different = dict(zip(keys, sequences, strict=True))     # the same images are encoded once
        tiles = [pruner.preprocess(own, self.processor) for own in different.values()]          # hook 0
        real = [self.model.image_tokens([self.processor.grid(image) for image in own]) for own in sequences]
        slots = [len(own) * config.max_num_tiles * config.tokens_per_tile for own in sequences]
        together = Tiles.cat(tiles)
        clock = Clock(self.model.device)
        with torch.inference_mode(), self.peak, tracked_encoder(self.model, together, self.progress):
            tokens = self.model.encode(tiles, keep_states or pruner.keep_states)
            if tokens is not None and len(keys) > len(tiles):
                tokens = tokens.select([list(different).index(key) for key in keys])
        return EncodedImages(together, tokens, clock.lap(), real, slots, [len(own) for own in sequences],
                             shared)

    def answer(self, conversations: list[list[dict]], encoded: EncodedImages,
               max_new_tokens: int | Sequence[int],
               sampler: Sampler = GREEDY, date: str | None = None,
               emit: Callable[[int, int], bool | None] = no_one, pruner: Pruner | None = None,
               policy: Policy | None = None, stop: Sequence[str] | Sequence[Sequence[str]] = (),
               too_long: Literal["refuse", "clamp"] = "refuse") -> Answer:
        """Answer the last turn of each conversation; all are about the same images, or each about its own.

        `max_new_tokens` is one number, or one for each conversation, and so are the lists of texts in `stop`.
        Where a prompt and its new tokens do not fit into the context, ValueError is raised, or with "clamp"
        the answer may have only as many tokens as there is room for: `Answer.limits`.
        An answer ends before any of the texts in `stop` appears. Then `emit` gets a token when it certainly
        belongs to the answer, but for one that reaches into the stop text: `Answer.texts` has it all.
        A pruner starts from all image tokens each time: what one question does not need, the next may.
        `policy` is for the chat template of a guard.
        """
        if not conversations:
            raise ValueError("there is no conversation to answer: give at least one")
        prompts = self.ranks.first(lambda: [self.tokenizer.encode(c, date, policy) for c in conversations])
        image = encoded.expand(len(prompts))
        limits = limits_of(max_new_tokens, len(prompts))
        if too_long == "clamp":
            context = self.model.config.text.max_position_embeddings
            room = [max(1, context - len(ids)) for ids in prompts]
            limits = [*map(min, limits, room)]
        elif too_long != "refuse":
            raise ValueError(f"too_long is {quoted(too_long)}, but must be refuse or clamp")
        self.ranks.check(partial(check_answer, self.model, prompts, encoded.tokens, limits))
        answers = StopTexts(self.tokenizer, stop, len(prompts), emit)
        pruner = over_ranks(on_device(pruner, self.devices), self.ranks)
        run = generate if not isinstance(pruner, Pruner) else pruner.around(generate)
        sample = self.ranks.alike(sampler.after(prompts))
        with self.peak, tracked_decoder(self.model, self.progress):
            answer = run(self.model, prompts, image, limits,
                         self.tokenizer.stop_ids, sample, answers.push, pruner, self.decode)
        answer.tokens, answer.texts = answers.finish(answer.tokens)
        answer.prompt_tokens = [len(ids) for ids in prompts]
        answer.limits = limits
        answer.real = encoded.counts(len(prompts))
        answer.peak_memory, answer.mapped_memory = self.peak.figures(self.model.device)
        answer.ms = {**self.ms, "encode": encoded.ms, **answer.ms}
        return answer

    def judge(self, conversations: list[list[dict]], encoded: EncodedImages, policy: Policy | None = None,
              pruner: Pruner | None = None) -> list[Verdict]:
        """Whether the last turn of each conversation is safe, the user's or the assistant's, by Llama Guard.

        `policy` has categories of one's own, or keys of those to leave out. Raises ValueError where this
        checkpoint is no guard, and for an answer that is neither safe nor unsafe.
        """
        guard = Guard(self.tokenizer, policy)
        answer = self.answer(conversations, encoded, MOST_TOKENS, pruner=pruner, policy=guard.policy)
        return guard.read(answer.texts)

    def warm_up(self, batch: int, encoded: EncodedImages):
        """Compile what a batch of answers about these images needs, so that no answer waits for it."""
        counts = encoded.images_of_each * batch if encoded.shared else encoded.images_of_each
        clock = Clock(self.model.device)
        prompts = [self.tokenizer.encode(messages("?", count)) for count in counts]
        with self.progress("compiling"):
            generate(self.model, prompts, encoded.expand(batch), WARM_UP_TOKENS, (), decode=self.decode)
        self.ms["compile"] = clock.lap()


def sequences_of(images: list) -> tuple[list[list[Image.Image]], bool]:
    """The images of each sequence, and whether they are one set for all. Raises ValueError for what is
    neither a list of images nor a list of lists."""
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"images is of type {type(images).__name__}, but must be a list of PIL images")
    lists = [isinstance(each, (list, tuple)) for each in images]
    if lists and any(lists) != all(lists):
        raise ValueError("images must be a list of images for all conversations, or a list of lists, one for "
                         "each, not both")
    return (images, False) if any(lists) else ([images], True)


def main():
    program.run(partial(ask, Assistant), arguments, together=True)


if __name__ == "__main__":
    main()
