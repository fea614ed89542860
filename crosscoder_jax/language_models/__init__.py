"""Run language models in torch and keep what they computed: the only room that imports torch.

Torch's files of tensors are read and written here too. Configs are importable without torch, so that a
command line can describe itself anywhere; everything that needs torch is imported at first use and asks
for the extra ``lm`` where it is missing.
"""

from typing import TYPE_CHECKING, Any

from crosscoder_jax.language_models.config import HarvestConfig as HarvestConfig
from crosscoder_jax.language_models.config import ModelReference as ModelReference
from crosscoder_jax.language_models.config import SpliceConfig as SpliceConfig
from crosscoder_jax.language_models.config import TextSource as TextSource
from crosscoder_jax.lazy import lazy_members

if TYPE_CHECKING:
    from crosscoder_jax.language_models.capture import capture_residuals as capture_residuals
    from crosscoder_jax.language_models.capture import check_capture as check_capture
    from crosscoder_jax.language_models.capture import find_blocks as find_blocks
    from crosscoder_jax.language_models.documents import Window as Window
    from crosscoder_jax.language_models.documents import WindowStream as WindowStream
    from crosscoder_jax.language_models.harvesting import harvest as harvest
    from crosscoder_jax.language_models.loading import ModelFacts as ModelFacts
    from crosscoder_jax.language_models.loading import load_model as load_model
    from crosscoder_jax.language_models.loading import load_tokenizer as load_tokenizer
    from crosscoder_jax.language_models.loading import read_facts as read_facts
    from crosscoder_jax.language_models.patched import evaluate_patched as evaluate_patched
    from crosscoder_jax.language_models.recovered import evaluate_spliced as evaluate_spliced
    from crosscoder_jax.language_models.tokenizers import check_tokenizers_agree as check_tokenizers_agree
    from crosscoder_jax.language_models.torch_files import read_torch_file as read_torch_file
    from crosscoder_jax.language_models.torch_files import read_torch_tensor as read_torch_tensor
    from crosscoder_jax.language_models.torch_files import write_torch_file as write_torch_file
    from crosscoder_jax.language_models.vocabulary import vocabulary_bytes as vocabulary_bytes

_get_member, __dir__ = lazy_members(
    __name__,
    {
        "capture_residuals": "capture",
        "check_capture": "capture",
        "find_blocks": "capture",
        "Window": "documents",
        "WindowStream": "documents",
        "harvest": "harvesting",
        "ModelFacts": "loading",
        "load_model": "loading",
        "load_tokenizer": "loading",
        "read_facts": "loading",
        "evaluate_patched": "patched",
        "evaluate_spliced": "recovered",
        "check_tokenizers_agree": "tokenizers",
        "read_torch_file": "torch_files",
        "read_torch_tensor": "torch_files",
        "write_torch_file": "torch_files",
        "vocabulary_bytes": "vocabulary",
    },
)


def __getattr__(name: str) -> Any:
    """Import what needs torch at first use, and say which extra brings it."""
    try:
        return _get_member(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("crosscoder_jax"):
            raise
        raise ModuleNotFoundError(
            f"{name} needs {error.name}: pip install 'crosscoder-jax[lm]'",
            name=error.name,
        ) from error
