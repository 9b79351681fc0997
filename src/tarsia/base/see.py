"""Stage one of the base model: a SigLIP tower learns to see under classification heads.

    python -m tarsia.base.see --photographs cifar10-train.parquet --work DIR

Each step shows photographs, handwritten digits and rendered scenes. For most of the run half of
the patches are hidden (PatchDropout, arXiv:2208.07220), which halves the cost. A killed run goes on
where its last checkpoint was; every batch is a function of (seed, step) alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from tarsia.base import pictures, resumable

TOWER = SiglipVisionConfig(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=3,
    image_size=pictures.SIZE,
    patch_size=8,
    vision_use_head=False,
)
GRID = pictures.SIZE // 8
SCENES = 8000
BATCH = {"photographs": 112, "digits": 12, "scenes": 24}


class Seer(nn.Module):
    """The tower and its temporary heads: class of a photograph, digit, shape and colour by quarter."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = SiglipVisionModel(TOWER)
        width = TOWER.hidden_size
        self.photograph = nn.Linear(width, len(pictures.PHOTOGRAPHS))
        self.digit = nn.Linear(width, 10)
        self.shape = nn.Linear(width, len(pictures.SHAPES) + 1)
        self.colour = nn.Linear(width, len(pictures.COLOURS) + 1)
        mimetic(self.tower)

    def forward(self, pixels: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, SIZE, SIZE] to features [B, n, width] and the patch numbers [B, n] kept."""
        x = self.tower.embeddings(pixels)
        patches = torch.arange(x.shape[1]).expand(x.shape[0], -1) if keep is None else keep
        x = x.gather(1, patches[..., None].expand(-1, -1, x.shape[-1]))
        x = self.tower.encoder(inputs_embeds=x).last_hidden_state
        return x, patches


def mimetic(tower: SiglipVisionModel) -> None:
    """Start attention as trained towers look (arXiv:2305.09828): QK' near I, VO near -I, 2-D sinusoids."""
    width, heads = TOWER.hidden_size, TOWER.num_attention_heads
    size = width // heads
    eye = torch.eye(width)
    with torch.no_grad():
        for layer in tower.encoder.layers:
            attention = layer.self_attn
            for h in range(heads):
                u, s, v = torch.linalg.svd(0.7 * torch.randn(width, width) / width**0.5 + 0.7 * eye)
                rows = slice(h * size, (h + 1) * size)
                attention.q_proj.weight[rows] = (u[:, :size] * s[:size].sqrt()).T
                attention.k_proj.weight[rows] = v[:size] * s[:size, None].sqrt()
            u, s, v = torch.linalg.svd(0.4 * torch.randn(width, width) / width**0.5 - 0.4 * eye)
            attention.v_proj.weight.copy_(v * s[:, None].sqrt())
            attention.out_proj.weight.copy_(u * s.sqrt())
        at = torch.arange(GRID, dtype=torch.float32)[:, None]
        wave = at / 10000 ** (torch.arange(width // 4) / (width // 4))
        one = torch.cat([wave.sin(), wave.cos()], 1)
        table = torch.cat([one.repeat_interleave(GRID, 0), one.repeat(GRID, 1)], 1)
        tower.embeddings.position_embedding.weight.copy_(0.5 * table)


def scene_labels(things: tuple[pictures.Thing, ...]) -> np.ndarray:
    """Shape and colour numbers by quarter, [4, 2]; the last number of each means empty."""
    labels = np.tile([len(pictures.SHAPES), len(pictures.COLOURS)], (4, 1))
    for thing in things:
        labels[pictures.POSITIONS.index(thing.position)] = (
            pictures.SHAPES.index(thing.shape),
            list(pictures.COLOURS).index(thing.colour),
        )
    return labels


class World:
    """All training pictures in memory, and the batch of any step."""

    def __init__(self, photographs: Path, seed: int) -> None:
        self.seed = seed
        self.photographs, labels = pictures.photographs(photographs)
        self.photograph_labels = np.array(labels)
        drawn = [pictures.scene(i) for i in range(SCENES)]
        self.scenes = np.stack([np.asarray(picture) for picture, _ in drawn])
        self.scene_labels = np.stack([scene_labels(things) for _, things in drawn])
        self.digits = pictures.digit_rows("train")

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixels of photographs, digits and scenes in this order, and the labels of each."""
        rng = np.random.default_rng((self.seed, step))
        epoch, place = divmod(step * BATCH["photographs"], len(self.photographs))
        order = np.random.default_rng((self.seed, epoch, 7)).permutation(len(self.photographs))
        rows = np.take(order, range(place, place + BATCH["photographs"]), mode="wrap")
        shown = [crop(self.photographs[i], rng) for i in rows]
        digits = []
        for row in rng.choice(self.digits, BATCH["digits"]):
            right, down = rng.integers(-6, 7, 2)
            picture, label = pictures.digit(int(row), (int(right), int(down)))
            shown.append(np.asarray(picture))
            digits.append(label)
        scenes = rng.integers(SCENES, size=BATCH["scenes"])
        pixels = np.concatenate([np.stack(shown), self.scenes[scenes]])
        return (
            normalise(pixels),
            torch.as_tensor(self.photograph_labels[rows]),
            torch.as_tensor(digits),
            torch.as_tensor(self.scene_labels[scenes]),
        )


def crop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move by up to 8 pixels with reflected borders and mirror half of the time."""
    y, x = rng.integers(0, 17, 2)
    padded = np.pad(picture, ((8, 8), (8, 8), (0, 0)), mode="reflect")
    moved = padded[y : y + pictures.SIZE, x : x + pictures.SIZE]
    return moved[:, ::-1] if rng.random() < 0.5 else moved


def normalise(pixels: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in -1..1, as the processor does."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def loss(model: Seer, batch: tuple[Tensor, Tensor, Tensor, Tensor], keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of the heads' losses, and the accuracy on photographs."""
    pixels, photographs, digits, scenes = batch
    features, patches = model(pixels, keep)
    pooled = features.mean(1)
    n, m = len(photographs), len(digits)
    said = model.photograph(pooled[:n])
    total = F.cross_entropy(said, photographs, label_smoothing=0.05)
    total = total + 0.15 * F.cross_entropy(model.digit(pooled[n : n + m]), digits)
    row, column = patches[n + m :] // GRID, patches[n + m :] % GRID
    quarter = (row >= GRID // 2).long() * 2 + (column >= GRID // 2).long()
    share = F.one_hot(quarter, 4).float()
    share = share / share.sum(1, keepdim=True).clamp_min(1)
    quarters = torch.einsum("bnq,bnd->bqd", share, features[n + m :])
    total = total + 0.15 * F.cross_entropy(model.shape(quarters).flatten(0, 1), scenes[..., 0].flatten())
    total = total + 0.15 * F.cross_entropy(model.colour(quarters).flatten(0, 1), scenes[..., 1].flatten())
    return total, (said.argmax(-1) == photographs).float().mean()


def kept(step: int, total: int, rows: int, seed: int) -> Tensor | None:
    """Half of the patches at random during the first two thirds of the run, then all."""
    if step > 0.67 * total:
        return None
    noise = torch.rand(rows, GRID * GRID, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
    return noise.argsort(1)[:, : GRID * GRID // 2].sort(1).values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="CIFAR-10 training Parquet file")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint and the log")
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stop", type=int, help="stop early at this step, as a killed run would")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = Seer()
    pair = resumable.optimisers(model, [model.tower.encoder], args.lr)
    checkpoint, log = args.work / "see.safetensors", args.work / "see.jsonl"
    first = resumable.load(checkpoint, model, pair)
    resumable.cut(log, first)
    command = f"python -m tarsia.base.see --steps {args.steps} --lr {args.lr} --seed {args.seed}"
    resumable.remember(args.work, command, first)
    world = World(args.photographs, args.seed)
    began = saved = time.monotonic()
    right, losses = [], []
    for step in range(first, args.steps):
        resumable.schedule(pair, step, args.steps)
        batch = world.batch(step)
        total, accuracy = loss(model, batch, kept(step, args.steps, len(batch[0]), args.seed))
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in pair:
            optimiser.step()
            optimiser.zero_grad()
        right.append(accuracy.item())
        losses.append(total.item())
        last = step + 1 in (args.steps, args.stop)
        if (step + 1) % 50 == 0 or last:
            seconds = (time.monotonic() - began) / (step + 1 - first)
            resumable.note(
                log,
                step=step + 1,
                loss=round(float(np.mean(losses)), 4),
                photographs=round(float(np.mean(right)), 4),
                seconds=round(seconds, 3),
            )
            right, losses = [], []
        if time.monotonic() - saved > 240 or last:
            resumable.save(checkpoint, step + 1, model, pair)
            saved = time.monotonic()
        if last:
            break


if __name__ == "__main__":
    main()
