"""MetaFormer: a vision transformer whose token mixer may be anything, and need not be attention.

Paper: metaformer

    y = x + s1 * Mix(Norm x)
    z = y + s2 * W2 gelu(W1 Norm y)

x: (example, position, dim), positions are the patches of a picture row by row. logits = W mean over
positions of Norm z_last. A stage begins with patches: of the picture, then of the grid before it;
with more than one stage the layers differ in width and in number of positions (`ragged`). A mixer
is a file beside this one with `Mixer(dim, grid, **options)`: `pooling` makes it PoolFormer, whose
norm is "group" (over all positions and dimensions of an example) and whose patches overlap; here
they do not, so that nothing but the mixer mixes.

Parameters, of one stage of width d, m = ratio * d, with a mixer that has none:
(patch^2 channels + 1 + positions) d + depth (2 d m + m + 5 d) + 2 d + (d + 1) labels; layer scale
adds 2 d a layer.

Reads as: a classifier whose layers differ from a transformer's in the mixer alone. Does not show
that attention does nothing where it is used: the mixer is one of several parts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithNoAttention,
    ImageClassifierOutputWithNoAttention,
)

from stratoscope.architectures.parts.norm import GroupNorm
from stratoscope.architectures.parts.patches import Patches, Placed
from stratoscope.errors import InputError
from stratoscope.models.family import RESIDUAL_POINTS, Family, Tower, into, out_of

NORMS = ("layer", "group")
STAGE = {"depth": 4, "dim": 64, "patch": 4, "mixer": "pooling"}


class MetaFormerConfig(PreTrainedConfig):
    """stages: one mapping for each, of depth (layers), dim, patch (side, of the picture or of the
    grid before), mixer (the name of a file here) and, if it has any, options of the mixer. norm:
    "layer" or "group". layer_scale: the value that the scales begin with; None for none."""

    model_type = "st_metaformer"

    def __init__(
        self,
        image_size: int = 32,
        num_channels: int = 3,
        stages: Sequence[dict[str, Any]] = (STAGE,),
        ratio: int = 4,
        norm: str = "layer",
        layer_scale: float | None = None,
        **common: Any,
    ) -> None:
        self.image_size, self.num_channels = image_size, num_channels
        self.stages = [STAGE | dict(stage) for stage in stages]
        self.ratio, self.norm, self.layer_scale = ratio, norm, layer_scale
        self.hidden_size = self.stages[-1]["dim"]
        super().__init__(**common)

    def grids(self) -> list[int]:
        """The side, in patches, of each stage's grid. Raises InputError where a stage does not
        divide the one before."""
        sides, side = [], self.image_size
        for number, stage in enumerate(self.stages):
            if side % stage["patch"]:
                raise InputError(
                    f"stage {number} cuts a side of {side} into patches of {stage['patch']}: give "
                    "a patch that divides it."
                )
            side //= stage["patch"]
            sides.append(side)
        return sides


def family(config: MetaFormerConfig) -> Family:
    """Where the sites of a MetaFormer lie; layer scales stand between a part and the stream."""
    one, two = ("scale_1", "scale_2") if config.layer_scale is not None else (None, None)
    tower = Tower(
        layers="layers",
        embed="patches.0",
        takes="pixel_values",
        final_norm="norm",
        points=RESIDUAL_POINTS
        | {
            "mix.out": out_of("mixer", scale=one),
            "mlp.pre": out_of("mlp.fc1"),
            "mlp.act": into("mlp.fc2"),
            "mlp.out": out_of("mlp", scale=two),
        },
        attn_write=(),
        mlp_write=("mlp.fc2", two) if two else ("mlp.fc2",),
        causal=False,
        between="the patches of the next stage" if len(config.stages) > 1 else None,
        lacks=dict.fromkeys(
            ("attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern", "attn.z", "attn.out"),
            "this mixer is no attention; what it writes is mix.out",
        ),
    )
    return Family("metaformer", {"": tower}, head=())


class MLP(nn.Module):
    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: MetaFormerConfig, stage: dict[str, Any], side: int) -> None:
        super().__init__()
        dim, norm = stage["dim"], nn.LayerNorm if config.norm == "layer" else GroupNorm
        self.norm_1, self.norm_2 = norm(dim), norm(dim)
        self.mixer = mixer(stage["mixer"])(dim, (side, side), **stage.get("options", {}))
        self.mlp = MLP(dim, config.ratio)
        scaled = config.layer_scale is not None
        self.scale_1 = nn.Parameter(torch.ones(dim)) if scaled else None
        self.scale_2 = nn.Parameter(torch.ones(dim)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(self.norm_1(x))
        x = x + (mixed if self.scale_1 is None else self.scale_1 * mixed)
        thought = self.mlp(self.norm_2(x))
        return x + (thought if self.scale_2 is None else self.scale_2 * thought)


def mixer(name: str) -> Any:
    """The `Mixer` of the file `name` on this shelf. Raises InputError where there is none."""
    mixer = None
    if name.isidentifier():
        try:
            mixer = getattr(import_module(f"{__package__}.{name}"), "Mixer", None)
        except ModuleNotFoundError as error:
            if error.name != f"{__package__}.{name}":
                raise
    if mixer is None:
        raise InputError(f"there is no mixer {name!r}: a mixer is a file of {__package__}.")
    return mixer


class MetaFormerPreTrainedModel(PreTrainedModel):
    config_class = MetaFormerConfig
    base_model_prefix = "metaformer"
    main_input_name = "pixel_values"
    FAMILY = staticmethod(family)

    def _init_weights(self, module: nn.Module) -> None:
        """Hugging Face's own, and what it does not know."""
        super()._init_weights(module)
        if isinstance(module, Placed):
            nn.init.normal_(module.place, std=0.02)
        if isinstance(module, Layer) and module.scale_1 is not None:
            nn.init.constant_(module.scale_1, self.config.layer_scale)
            nn.init.constant_(module.scale_2, self.config.layer_scale)


class MetaFormerModel(MetaFormerPreTrainedModel):
    """The stack alone: pixels to the normalised last stream."""

    def __init__(self, config: MetaFormerConfig) -> None:
        super().__init__(config)
        if config.norm not in NORMS:
            raise InputError(f"norm {config.norm!r}: choose one of {', '.join(NORMS)}.")
        self.patches, self.layers = nn.ModuleList(), nn.ModuleList()
        self.depths, channels = [stage["depth"] for stage in config.stages], config.num_channels
        for stage, side in zip(config.stages, config.grids()):
            how = (channels, stage["dim"], stage["patch"])
            self.patches.append(Patches(*how) if len(self.layers) else Placed(*how, side * side))
            self.layers.extend(Layer(config, stage, side) for _ in range(stage["depth"]))
            channels = stage["dim"]
        self.norm = (nn.LayerNorm if config.norm == "layer" else GroupNorm)(channels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patches[0]

    def forward(
        self, pixel_values: Float[Tensor, "example channel row column"], **options: Any
    ) -> BaseModelOutputWithNoAttention:
        x, layers, sides = pixel_values, iter(self.layers), self.config.grids()
        for number, (patches, depth) in enumerate(zip(self.patches, self.depths)):
            if number:
                x = x.transpose(1, 2).unflatten(2, (sides[number - 1], sides[number - 1]))
            x = patches(x)
            for _ in range(depth):
                x = next(layers)(x)
        return BaseModelOutputWithNoAttention(last_hidden_state=self.norm(x))


class MetaFormerForImageClassification(MetaFormerPreTrainedModel):
    """Logits of classes, read from the mean over positions."""

    def __init__(self, config: MetaFormerConfig) -> None:
        super().__init__(config)
        self.metaformer = MetaFormerModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Float[Tensor, "example channel row column"],
        labels: Tensor | None = None,
        **options: Any,
    ) -> ImageClassifierOutputWithNoAttention:
        x = self.metaformer(pixel_values).last_hidden_state
        logits = self.classifier(x.mean(dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


def build(
    config: MetaFormerConfig | None = None, *, seed: int = 0, **settings: Any
) -> MetaFormerForImageClassification:
    """A classifier with fresh weights, drawn from `seed`; torch's random state is the same
    afterwards.

    settings: of `MetaFormerConfig`, where no config is given. Raises InputError for a stage whose
    patches do not divide what they cut, an unknown mixer or norm.
    """
    if config is not None and settings:
        raise InputError(f"a config was given, and {', '.join(settings)} beside it: give one.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MetaFormerForImageClassification(config or MetaFormerConfig(**settings)).eval()


AutoConfig.register(MetaFormerConfig.model_type, MetaFormerConfig, exist_ok=True)
AutoModel.register(MetaFormerConfig, MetaFormerModel, exist_ok=True)
AutoModelForImageClassification.register(
    MetaFormerConfig, MetaFormerForImageClassification, exist_ok=True
)
