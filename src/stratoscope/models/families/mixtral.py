"""Mixtral: the MLP is a mixture of experts; the router's logits are a site, the neurons of fused
experts are not."""

from __future__ import annotations

from stratoscope.models.families.llama import TOWER
from stratoscope.models.family import Family, out_of

_REASON = (
    "a mixture of experts computes its neurons expert by expert in one fused kernel; read "
    "`mlp.router` or `mlp.out`"
)

FAMILIES = {
    "mixtral": Family(
        "mixtral",
        {
            "": TOWER.but(
                points={"mlp.router": out_of("mlp.gate")},
                mlp_write=(),
                lacks={"mlp.pre": _REASON, "mlp.act": _REASON},
            )
        },
        handles=frozenset(
            {"sliding_window", "num_local_experts", "num_experts_per_tok", "router_aux_loss_coef"}
        ),
    )
}
