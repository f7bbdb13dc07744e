"""The head on the convolutions' maps: pooled and linear, or a judge of each place whose map is the explanation."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from chestct.config.schema import ModelConfig
from chestct.config.targets import build
from chestct.errors import ConfigError


def make_head(cfg: ModelConfig, width: int, outputs: int, grid: tuple[int, int]) -> nn.Sequential:
    """Pooling, then linear layers with ReLU and dropout between them, or a head of the user's own.

    width: features, as they are pooled; grid: height and width of the maps.
    """
    places = cfg.pool == "topk"
    in_half = places and cfg.standardise and not cfg.head
    layers: list[nn.Module] = [Pool(cfg.pool, in_half), *([Maximum()] if cfg.pool == "max" else [])]
    if cfg.head:
        head = build(cfg.head, nn.Module, "model.head", in_features=width, out_features=outputs)
        features = (2, width, *grid) if places else (2, width)
        _check(head, features, (2, outputs), f"model.head._target_={cfg.head['_target_']}")
        return nn.Sequential(*layers, head)
    if cfg.standardise:
        layers.append(Standardise(width, places))
    for i, out in enumerate((*cfg.hidden, outputs)):
        if cfg.context and places and not i:
            layers += [InContext(width, out, cfg.dropout), nn.ReLU()]
        else:
            # Of places whole channels are dropped: it costs less, and neighbours would give away what is missing.
            drop = (nn.Dropout2d if places else nn.Dropout)(cfg.dropout)
            layers += [drop, nn.Conv2d(width, out, 1) if places else nn.Linear(width, out), nn.ReLU()]
        width = out
    if not places:
        return nn.Sequential(*layers[:-1])
    smooth = [Smooth(cfg.smooth, grid)] if cfg.smooth else []
    return nn.Sequential(*layers[:-1], *smooth, BestPlaces())


@torch.no_grad()
def _check(head: nn.Module, features: tuple[int, ...], logits: tuple[int, ...], name: str) -> None:
    """Raises ConfigError for a user's head that does not take these features, or gives no logits of this shape."""
    try:
        found = f"gives {list(head.eval()(torch.zeros(features)).shape)}"
    except Exception as error:  # whatever the code of a user raises
        found = f"raises {type(error).__name__}: {error}"
    head.train()
    if found != f"gives {list(logits)}":
        raise ConfigError(f"{name}: of features {list(features)} it is to make logits {list(logits)}, but it {found}.")


class Pool(nn.Module):
    """[B, C, h, w] -> [B, C] (gap), [B, C * 2] (max), [B, C * 3], [B, C * h * w] (flatten) or as it is (topk).

    What is pooled passes. The mean comes first in all of them: novelty is judged by it, whatever the head reads.
    in_half: whether cached places stay float16, since what follows takes them so.
    """

    def __init__(self, pool: str, in_half: bool = False) -> None:
        super().__init__()
        self.pool, self.in_half = pool, in_half

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if maps.ndim == 2 or self.pool == "topk":
            return maps if self.in_half else maps.float()
        if self.pool == "flatten":
            return maps.flatten(1)
        parts = [maps.mean((2, 3))]
        if self.pool != "gap":
            parts.append(maps.amax((2, 3)))
        if self.pool == "mean_max_std":
            parts.append((maps.var((2, 3), correction=0) + 1e-6).sqrt())  # with a gradient where nothing varies
        return torch.stack(parts, 2).flatten(1)


class Maximum(nn.Module):
    """[B, C * 2] of `Pool("max")` -> the maxima [B, C]."""

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled[:, 1::2]


class Standardise(nn.BatchNorm2d):
    """Each channel less its mean, over its spread; of places cut at CUT spreads: a scanner that training has not seen
    may light a channel up as no slice there did, and must not decide alone."""

    CUT = 5.0

    def __init__(self, channels: int, places: bool = True) -> None:
        super().__init__(channels, affine=False)
        self.places, self.fitted = places, False

    @torch.no_grad()
    def fit(self, maps: Iterable[torch.Tensor], w: torch.Tensor | None = None) -> None:
        """Takes means and spreads from maps [N, C, h, w], given in parts, weighted by w [N], for good: not by batch.

        A batch's own would depend on what else is in it, and count phantoms or a large source by their slices.
        """
        mean, square = torch.zeros(2, self.num_features, dtype=torch.float64)
        count, total = 0, 0.0
        for part in maps:
            weight = torch.ones(len(part)) if w is None else w[count : count + len(part)]
            places, weight = part.float().flatten(2), weight.double()
            mean += weight @ places.mean(2).cpu().double()
            square += weight @ places.square().mean(2).cpu().double()
            count, total = count + len(part), total + float(weight.sum())
        mean, square = mean / total, square / total
        self.get_buffer("running_mean").copy_(mean)
        self.get_buffer("running_var").copy_(square - mean.square())
        self.fitted = True

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        batches = self.training and not self.fitted and maps[:, 0].numel() > 1  # one value has no spread
        out = functional.batch_norm(maps, self.running_mean, self.running_var, training=batches, eps=self.eps)
        # In place, and cached ones in float16, which loses a thousandth: half the memory, a third of the time.
        return out.clamp_(-self.CUT, self.CUT).float() if self.places else out


class InContext(nn.Conv2d):
    """A 1 x 1 convolution of each place and of its difference to the mean of its slice: [B, C, h, w] -> [B, K, h, w].

    How bright, sharp or noisy a place is says little unless it is known what it is to be compared with. Dropout takes
    away whole channels, of the place or of the difference.
    """

    def __init__(self, channels: int, out: int, dropout: float) -> None:
        super().__init__(2 * channels, out, 1)
        self.dropout = dropout

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        # W x + V (x - m) = (W + V) x - V m, which takes a third of the time of a convolution of both.
        batch, channels, height, width = maps.shape
        kept = functional.dropout(maps.new_ones(batch, 1, 2 * channels), self.dropout, self.training)
        place, difference = (self.weight.flatten(1) * kept).chunk(2, 2)  # (B, K, C) each
        mean = maps.mean((2, 3)).unsqueeze(1)
        offset = (mean @ difference.mT).mT  # (B, K, 1)
        out = (place + difference) @ maps.flatten(2) - offset + self.get_parameter("bias")[:, None]
        return out.reshape(batch, -1, height, width)


def has_places(head: nn.Sequential) -> bool:
    """Whether a head judges places one by one, so that `head[:-1]` gives the explanation (model.pool=topk)."""
    return isinstance(head[-1], BestPlaces)


class Smooth(nn.Module):
    """Evidence [B, K, h, w], each place averaged with its neighbours by a Gaussian of `spread` places.

    A lesion lights up places that touch, the end of a vessel one alone.
    """

    def __init__(self, spread: float, grid: tuple[int, int]) -> None:
        super().__init__()
        for name, side in zip(("rows", "columns"), grid, strict=True):
            places = torch.arange(side, device="cpu")
            weights = torch.exp(-0.5 * ((places[:, None] - places) / spread) ** 2)
            self.register_buffer(name, weights / weights.sum(1, keepdim=True), persistent=False)  # outside lies none

    def forward(self, evidence: torch.Tensor) -> torch.Tensor:
        return self.get_buffer("rows") @ evidence @ self.get_buffer("columns").T


class BestPlaces(nn.Module):
    """Evidence [B, K, h, w] -> logits [B, K]: the mean over the BEST places, or all if fewer, of each slice and output.

    One place is noise, and the mean over all of them is what a small lesion drowns in.
    """

    BEST = 3

    def forward(self, evidence: torch.Tensor) -> torch.Tensor:
        places = evidence.flatten(2)
        return places.topk(min(self.BEST, places.shape[2]), 2).values.mean(2)
