"""Config keys: those a family handles, and the refusal by name of those it does not.

A key that its config class declares, that differs from the class's default, and that no one has
thought about could change what a site means. It is refused, never passed over.
"""

from __future__ import annotations

from typing import Any

from stratoscope.errors import FamilyError
from stratoscope.models.family import Family

# Keys whose effect is inside the modules that Hugging Face runs, or on sizes that `Layout` reads
# from the modules.
COMMON = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim n_embd n_layer n_head n_positions dim hidden_dim n_layers n_heads
    ffn_dim depth num_heads out_hidden_size in_channels max_position_embeddings rope_parameters
    rope_theta rope_scaling partial_rotary_factor rms_norm_eps layer_norm_eps layer_norm_epsilon
    norm_eps eps layer_norm_elementwise_affine hidden_act hidden_activation activation_function
    activation activation_dropout attention_bias mlp_bias qkv_bias bias clip_qkv use_bias
    attention_dropout dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob
    embd_pdrop attn_pdrop resid_pdrop classifier_dropout embed_dropout mlp_dropout
    seq_classif_dropout qa_dropout layerdrop embedding_dropout resid_pdrop layer_dropout
    embedding_size summary_type summary_use_proj summary_first_dropout summary_activation
    summary_proj_to_labels bos_token_id eos_token_id pad_token_id _pad_token_id cls_token_id
    sep_token_id mask_token_id decoder_start_token_id tie_word_embeddings initializer_range
    initializer_factor initializer_cutoff_factor init_std use_cache dtype torch_dtype image_size
    patch_size num_channels num_patches projection_size pooler_output_size pooler_act
    spatial_merge_size temporal_patch_size fullatt_block_indexes window_size tokens_per_second
    projection_dim logit_scale_init_value encoder_stride architectures transformers_version
    _name_or_path id2label label2id num_labels problem_type chunk_size_feed_forward
    output_attentions output_hidden_states return_dict is_encoder_decoder pretraining_tp
    task_specific_params attn_implementation _attn_implementation _attn_implementation_autoset
    model_type text_config vision_config
    """.split()
)
# Common in name, but a non-default value changes the computation in a way no family here takes
# account of.
CHANGING = frozenset({"chunk_size_feed_forward", "pretraining_tp", "is_encoder_decoder"})


def unhandled(config: Any, family: Family) -> dict[str, Any]:
    """Keys of the config (and of its text and vision parts) that differ from the default and that
    nobody handles."""
    known = (COMMON - CHANGING) | family.handles
    unknown: dict[str, Any] = {}
    for part in {id(c): c for c in (config, *_parts(config))}.values():
        default = type(part)().to_dict()
        renamed = set(getattr(part, "attribute_map", {}).values())
        for key, value in part.to_dict().items():
            if key in default and value != default[key] and key not in known and key not in renamed:
                unknown[key] = value
    return unknown


def refuse_unhandled(config: Any, family: Family) -> None:
    """Raise FamilyError that names every unhandled key."""
    keys = unhandled(config, family)
    if keys:
        listed = ", ".join(f"`{key}` = {value!r:.60}" for key, value in sorted(keys.items()))
        raise FamilyError(
            f"this {config.model_type} config sets {listed}, which family `{family.name}` does not "
            "handle; what its "
            "sites mean would be uncertain, so it is refused. Add the key to the family's "
            "`handles` once it is proved."
        )


def _parts(config: Any) -> list[Any]:
    parts = (getattr(config, name, None) for name in ("text_config", "vision_config"))
    return [part for part in parts if part is not None]
