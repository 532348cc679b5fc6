# SPDX-License-Identifier: Apache-2.0
"""Pictures of block masks and attention maps (matplotlib, an optional extra)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seer_cuda.block_mask import BlockMask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from seer_cuda._attention_map import AttentionMap

# Colour-blind safe (Okabe and Ito 2008): blue on light grey differs in lightness too, so the
# picture survives greyscale printing.
_KEPT, _LEFT_OUT, _HIDDEN = "#0072B2", "#DDDDDD", "#FFFFFF"
_FLOOR = 1e-6  # probabilities below are drawn as this


def plot_block_mask(
    mask: BlockMask,
    pooled: Tensor | None = None,
    *,
    batch: int = 0,
    max_heads: int = 8,
    title: str | None = None,
) -> Figure:
    """Draws the mask of each head as a small panel: rows are query blocks, columns KV blocks.

    Blue blocks are kept, grey ones visible but left out, white ones hidden by the causal rule. The
    title of a panel is the head's density.

    Args:
        mask: The mask. It is copied to the host.
        pooled: ``[batch|1, heads, blocks_q, blocks_kv]`` attention map (`seer_cuda.attn_pool`);
            drawn beside each head's mask on a logarithmic scale.
        batch: Which batch entry, or which packed sequence.
        max_heads: Panels at most; the first heads are drawn.
        title: Of the whole figure; default: shape and density.

    Returns:
        A matplotlib Figure, not shown; save it with ``figure.savefig(path)``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: pooled does not have the mask's block counts.
    """
    plt, colors = _matplotlib()
    if pooled is not None and tuple(pooled.shape[-2:]) != (mask.blocks_q, mask.blocks_kv):
        raise ValueError(
            f"seer::plot_block_mask: pooled: expected [..., {mask.blocks_q}, {mask.blocks_kv}], "
            f"got {list(pooled.shape)}. Pool with the mask's block sizes."
        )
    entry = min(batch, mask.batch - 1)
    dense, visible = mask.to_dense()[entry].cpu(), mask.causal_visible().cpu()
    density = mask.density().cpu()
    if visible.dim() == 4:  # packed sequences
        visible = visible[batch, 0]
    density = density[min(batch, len(density) - 1)]
    # One row of the mask may serve several heads of the map, or the other way round.
    every = mask.heads if pooled is None else max(mask.heads, pooled.shape[1])
    heads = min(every, max_heads)
    kinds = 1 if pooled is None else 2  # panels per head
    columns = max(1, min(heads, 4 // kinds))  # heads per line
    lines = max(1, math.ceil(heads / columns))
    figure, axes = plt.subplots(
        lines,
        columns * kinds,
        figsize=(max(4.4, 2.4 * columns * kinds + 0.6), 2.5 * lines + 0.8),
        squeeze=False,
        layout="constrained",
    )
    floor = _FLOOR if pooled is None else _scale_floor(pooled, visible)
    palette = colors.ListedColormap([_HIDDEN, _LEFT_OUT, _KEPT])
    image = None
    for head in range(lines * columns):
        line, column = divmod(head, columns)
        panels = axes[line][column * kinds : (column + 1) * kinds]
        if head >= heads:
            for panel in panels:
                panel.axis("off")
            continue
        own = head * mask.heads // every
        state = visible.to(torch.uint8) + (visible & dense[own]).to(torch.uint8)
        panels[0].imshow(state.numpy(), cmap=palette, vmin=0, vmax=2, interpolation="nearest")
        panels[0].set_title(f"head {head} · density {density[own]:.2f}", fontsize=9)
        _style(panels[0], mask, column == 0)
        if pooled is not None:
            source = pooled[min(batch, pooled.shape[0] - 1), head * pooled.shape[1] // every]
            values = source.detach().float().cpu().clamp_min(floor).masked_fill(~visible, math.nan)
            scale = colors.LogNorm(vmin=floor, vmax=1.0)
            image = panels[1].imshow(
                values.numpy(), cmap="cividis", norm=scale, interpolation="nearest"
            )
            panels[1].set_title("attention", fontsize=9)
            _style(panels[1], mask, False)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.8, label="largest probability in block")
    mean = float(density.mean()) if density.numel() else 0.0
    figure.suptitle(
        title
        or f"{mask.blocks_q} x {mask.blocks_kv} blocks of {mask.block_q} x {mask.block_kv} tokens"
        f" · density {mean:.3f}",
        fontsize=11,
    )
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="#888888", linewidth=0.5)
        for color in (_KEPT, _LEFT_OUT)
    ]
    figure.legend(
        handles,
        ["kept", "left out"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    return figure


def plot_attention_map(
    found: AttentionMap, *, batch: int = 0, max_heads: int = 8, title: str | None = None
) -> Figure:
    """Draws the map of each head as a small panel on a logarithmic scale.

    Args:
        found: From `seer_cuda.attention_map`. It is copied to the host.
        batch: Which batch entry, or which packed sequence.
        max_heads: Panels at most; the first heads are drawn.
        title: Of the whole figure; default: block counts and sizes.

    Returns:
        A matplotlib Figure, not shown; save it with ``figure.savefig(path)``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt, colors = _matplotlib()
    values, visible = found.values[batch].detach().float().cpu(), found.visible().cpu()
    heads = min(values.shape[0], max_heads)
    columns = max(1, min(heads, 4))
    lines = max(1, math.ceil(heads / columns))
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(max(4.4, 2.4 * columns + 0.6), 2.5 * lines + 0.6),
        squeeze=False,
        layout="constrained",
    )
    scale = colors.LogNorm(vmin=_scale_floor(values, visible), vmax=1.0)
    image = None
    for head in range(lines * columns):
        panel = axes[head // columns][head % columns]
        if head >= heads:
            panel.axis("off")
            continue
        shown = values[head].clamp_min(scale.vmin).masked_fill(~visible, math.nan)
        image = panel.imshow(
            shown.numpy(), cmap="cividis", norm=scale, interpolation="nearest", aspect="auto"
        )
        panel.set_title(f"head {head}", fontsize=9)
        _style_panel(panel, tuple(values.shape[-2:]), head % columns == 0)
    if image is not None:
        kinds = {"max": "largest probability in block", "sum": "block's share of the attention"}
        figure.colorbar(image, ax=axes, shrink=0.8, label=kinds[found.reduce])
    blocks_q, blocks_kv = values.shape[-2:]
    size = f"{blocks_q} x {blocks_kv} blocks of {found.block_q} x {found.block_kv} tokens"
    figure.suptitle(title or size, fontsize=11)
    return figure


def _scale_floor(pooled: Tensor, visible: Tensor) -> float:
    """Low end of the colour scale: the power of ten below nearly all visible values."""
    seen = pooled.detach().float().cpu()[..., visible].nan_to_num()
    if seen.numel() == 0:
        return _FLOOR
    low = seen.flatten()[:: max(1, seen.numel() // 100_000)].quantile(0.01).clamp(_FLOOR, 0.1)
    return 10.0 ** math.floor(math.log10(low.item()))


def _style(panel: Axes, mask: BlockMask, first: bool) -> None:
    _style_panel(panel, (mask.blocks_q, mask.blocks_kv), first)


def _style_panel(panel: Axes, blocks: tuple[int, int], first: bool) -> None:
    panel.set_xticks([0, blocks[1] - 1])
    panel.set_yticks([0, blocks[0] - 1])
    panel.tick_params(length=2, labelsize=7, labelleft=first)
    if first:
        panel.set_ylabel("query block", fontsize=8)
    panel.set_xlabel("KV block", fontsize=8, labelpad=-6)
    for side in panel.spines.values():
        side.set_color("#BBBBBB")


def _matplotlib() -> tuple:
    try:
        from matplotlib import colors
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError(
            "seer_cuda: plots need matplotlib, which is not installed. Install it with "
            "`pip install seer_cuda[plot]` or `pip install matplotlib`."
        ) from error
    return plt, colors
