"""State spaces without attention: Mamba, Falcon Mamba and Mamba-2.

A layer is one mixer. Its first projection gives `ssm.in`, what the convolution and the state space
read; `ssm.gate`, what SiLU makes the factor of their output; and, of Mamba-2, `ssm.delta`, each
head's step before bias and softplus. `ssm.z` is what the last projection takes, gate (and norm)
done, so that `lm.weight("layers.0.mix.out")` @ ssm.z is `mix.out`. See `models/ssm.py`.
"""

from __future__ import annotations

from typing import Any

from stratoscope.models.family import Family, Point, Tower, into, out_of
from stratoscope.models.sites import SEAM_POINTS

_INSIDE = "mixer.in_proj"
_NO_DELTA = (
    "Mamba makes its step of what its convolution gives, inside the scan; `models/ssm.py` writes "
    "it out"
)


def _tower(name: str, points: dict[str, Point], lacks: dict[str, str]) -> Tower:
    attention = f"this layer is a {name}, not attention; read `ssm.z` or `mix.out`"
    return Tower(
        layers="layers",
        embed="embeddings",
        final_norm="norm_f",
        points={
            "resid_pre": into(""),
            "ssm.z": into("mixer.out_proj"),
            "mix.out": out_of("mixer"),
            "resid_post": out_of(""),
        }
        | points,
        attn_write=(),
        mlp_write=(),
        mix_write=("mixer.out_proj",),
        mixes=True,
        lacks=dict.fromkeys((*sorted(SEAM_POINTS), "attn.z", "attn.out"), attention)
        | {"resid_mid": "this layer adds to the stream once"}
        | dict.fromkeys(("mlp.pre", "mlp.act", "mlp.out"), "this layer has no MLP")
        | lacks,
    )


# Mamba's projection gives both halves, of one width
_HALVES = {"ssm.in": out_of(_INSIDE, part=(0, 2)), "ssm.gate": out_of(_INSIDE, part=(1, 2))}
_HANDLED = frozenset(
    {
        "state_size", "expand", "conv_kernel", "use_conv_bias", "residual_in_fp32",
        "time_step_rank", "time_step_scale", "time_step_min", "time_step_max",
        "time_step_init_scheme", "time_step_floor", "time_step_limit", "rescale_prenorm_residual",
        "use_mambapy", "use_associative_scan", "use_falcon_mambapy", "mixer_rms_eps", "n_groups",
        "chunk_size", "rms_norm", "norm_before_gate", "layer_types",
    }
)  # fmt: skip


def _mamba2(config: Any) -> Family:
    inner = int(config.expand * config.hidden_size)
    ends = 2 * inner + 2 * config.n_groups * config.state_size
    points = {
        "ssm.gate": Point(_INSIDE, "output", columns=(0, inner)),
        "ssm.in": Point(_INSIDE, "output", columns=(inner, 2 * inner)),
        "ssm.delta": Point(_INSIDE, "output", columns=(ends, ends + config.num_heads)),
    }
    return Family("mamba2", {"": _tower("Mamba2Mixer", points, {})}, handles=_HANDLED)


FAMILIES = {
    name: Family(name, {"": _tower(mixer, _HALVES, {"ssm.delta": _NO_DELTA})}, handles=_HANDLED)
    for name, mixer in (("mamba", "MambaMixer"), ("falcon_mamba", "FalconMambaMixer"))
} | {"mamba2": _mamba2}
