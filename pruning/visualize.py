"""Maps of what a pruner kept or merged, or of where the prompt looks, over the image as the model saw it.

    Recorder(pruner) ── generate ─► its image, image_kv, clusters, received
        ── kept_map, attention_map ─► a PIL image

Class tokens have no position in the tile; they are counted instead. Only the first sequence of a batch is
drawn.
"""
import torch
from PIL import Image
from torch import Tensor

from pruning.recorder import Recorder
from pruning.sheet import cell, sheet
from pruning.view import coords_of, remarks, views_of
from weights.images import ImageProcessor

MAP_SUFFIXES = ".png", ".jpg", ".jpeg", ".webp"         # of the files that a map may be written to


def kept_map(images: list[Image.Image], processor: ImageProcessor, recorder: Recorder,
             title: str) -> Image.Image:
    """What every layer holds after prefill: dropped patches are dark, kept ones clear and outlined; or the
    clusters, if the method says which tokens it has merged.

    A patch that only some key/value heads dropped is less dark. There is one panel for each image that the
    last prompt token sees, and for each cross-attention layer if the layers differ. `title` is the first line
    of the legend. Raises ValueError if nothing was recorded, or if other images were.
    """
    if recorder.clusters:
        return clusters_map(images, processor, recorder, title)
    held = [coords_of(kv) for kv in recorder.image_kv]
    views = views_of(images, processor, recorder, [coords for sets in held for coords in sets])
    blocks = []
    every = []
    for view in views:
        layers = [view.shares(sets) for sets in held]
        alike = all(torch.equal(layer[0], layers[0][0]) and layer[1:] == layers[0][1:] for layer in layers)
        every += layers
        names = [f"layer {i}" for i in range(len(held))]
        names = [f"all {len(held)} layers"] if alike and len(held) > 1 else names
        blocks.append([cell(view.paint(share), f"{view.name}{name}: {round(tokens, 1):g} kept\n"
                            f"class tokens kept {round(classes, 1):g} of {view.tiles}")
                       for name, (share, tokens, classes) in zip(names, layers, strict=False)])
    real = sum(view.tokens for view in views)
    kept = sum(tokens for _, tokens, _ in every) / len(held)
    mean = ", mean over layers" if any(len(cells) > 1 for cells in blocks) else ""
    some = any(bool(((share > 0) & (share < 1)).any()) for share, _, _ in every)
    legend = "kept; dark: dropped" if not recorder.merges else "kept; dark: merged into kept tokens"
    return sheet(blocks, title, [
        f"{real} real image tokens -> {round(kept, 1):g} kept ({kept / real:.1%}{mean})",
        f"bright and outlined: {legend}" + ("; between: dropped by some key/value heads" if some else ""),
        *remarks(views, len(images))])


def clusters_map(images: list[Image.Image], processor: ImageProcessor, recorder: Recorder,
                 title: str) -> Image.Image:
    """The tokens that were merged: every patch in the mean colour of its cluster, and clusters outlined.

    Beside each image that the last prompt token sees stands a panel for all layers, or one for those that
    share their clusters; of several key/value heads the first is drawn. `title` is the first line of the
    legend. Raises ValueError if nothing was recorded, or if other images were.
    """
    held = [coords for kv in recorder.image_kv for coords in coords_of(kv)]
    views = views_of(images, processor, recorder, held)
    coords = coords_of(recorder.image)[0]
    clusterings = distinct(recorder.clusters, len(recorder.image_kv))
    blocks = []
    for view in views:
        mine = coords[:, 0] == view.image
        cells = [cell(view.paint(view.spread(coords[mine], torch.ones(int(mine.sum())))),
                      f"{view.name}as the model saw it\n{int(mine.sum())} tokens")]
        for name, owners in clusterings:
            owner = owners[0, mine]
            tokens, sizes = owner.unique(return_counts=True)
            panel = view.paint_clusters(coords[mine], owner, coords[tokens[(sizes > 1) & mine[tokens]]])
            cells.append(cell(panel, f"{view.name}{name}: {len(tokens)} clusters\n"
                                     f"tokens in the largest: {sizes.max()}"))
        blocks.append(cells)
    sight = torch.isin(coords[:, 0], torch.tensor([view.image for view in views]))
    counts = [len(owner.unique()) for owners in recorder.clusters for owner in owners[:, sight]]
    real = sum(view.tokens for view in views)
    kept = sum(counts) / len(counts)
    mean = ", mean over layers" if len(clusterings) > 1 else ""
    return sheet(blocks, title, [
        f"{real} real image tokens -> {round(kept, 1):g} clusters ({kept / real:.1%}{mean})",
        "a cluster is read as one token; its patches have the mean colour of their pixels, and an outline",
        "dot: the patch whose position this token keeps; a cluster may have several regions",
        *remarks(views, len(images))])


def distinct(clusters: list[Tensor], layers: int) -> list[tuple[str, Tensor]]:
    """Owners [K, n] of each layer or one for all -> those that differ, and what they are called."""
    if len(clusters) not in (1, layers):
        raise ValueError(f"the pruner has owners of {len(clusters)} layers, but there are {layers}: set one "
                         "for each layer, or one for all")
    groups = []
    for i, owners in enumerate(clusters):
        same = [group for group in groups if torch.equal(group[1], owners)]
        if same:
            same[0][0].append(str(i))
        else:
            groups.append(([str(i)], owners))
    found = []
    for which, owners in groups:
        name = f"layer{'s' * (len(which) > 1)} {', '.join(which)}"
        if len(groups) == 1 and layers > 1:
            name = f"all {layers} layers"
        if len(owners) > 1:
            name += f", KV head 0 of {len(owners)}"
        found.append((name, owners))
    return found


def attention_map(images: list[Image.Image], processor: ImageProcessor, recorder: Recorder,
                  title: str) -> Image.Image:
    """The attention that each patch receives, over the image in grey: a panel for each cross-attention layer.

    The brightest patch receives most; all images of a layer have one scale. A token that was dropped before a
    layer has no colour there. `title` is the first line of the legend. Raises ValueError if no attention was
    recorded, or if other images were.
    """
    views = views_of(images, processor, recorder, [coords for _, coords in recorder.received])
    blocks = [[] for _ in views]
    for i, (mass, coords) in enumerate(recorder.received):
        patch = coords[:, 2] >= 0
        share = mass / mass.sum()
        most = mass[patch].max() if patch.any() else mass.max()
        for cells, view in zip(blocks, views, strict=True):
            mine = coords[:, 0] == view.image
            label = f"{view.name}layer {i}\n{share[mine & ~patch].sum():.1%} on class tokens"
            if len(views) > 1:
                label += f", {share[mine & patch].sum():.1%} on patches"
            heat = view.spread(coords[mine], mass[mine] / most).clamp(0, 1).sqrt()
            there = view.spread(coords[mine], torch.ones(int(mine.sum()))) > 0
            cells.append(cell(view.paint(there.float(), heat), label))
    dropped = min(len(mass) for mass, _ in recorder.received) < len(coords_of(recorder.image)[0])
    return sheet(blocks, title, [
        "attention of the prompt on each patch, mean over heads, in each cross-attention layer",
        "brightest: most (square root)" + ("; no colour: dropped before this layer" if dropped else ""),
        *remarks(views, len(images))])
