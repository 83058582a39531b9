"""The arguments of `AutoMergedModel.from_pretrained`, checked before anything is merged."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from neuromerge_hf.config import DEFAULT_METHOD, METHODS, config_class
from neuromerge_hf.options import nearest, options_of

OF_TRANSFORMERS = (
    "adapter_kwargs",
    "adapter_name",
    "allow_all_kernels",
    "attn_implementation",
    "code_revision",
    "config",
    "device_map",
    "device_mesh",
    "disable_mmap",
    "distributed_config",
    "dtype",
    "experts_implementation",
    "force_download",
    "fusion_config",
    "generation_config",
    "ignore_mismatched_sizes",
    "kernel_config",
    "key_mapping",
    "local_files_only",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "offload_state_dict",
    "output_loading_info",
    "quantization_config",
    "state_dict",
    "token",
    "torch_dtype",
    "tp_plan",
    "tp_size",
    "tqdm_class",
    "trust_remote_code",
    "use_kernels",
    "use_safetensors",
    "variant",
    "weights_only",
)
"""The arguments of transformers' `PreTrainedModel.from_pretrained`, but for those that a merge has no use for."""

INSTEAD = {
    "subfolder": 'write the folder into the id: "owner/name/folder"',
    "gguf_file": "a merge writes safetensors",
    "proxies": "huggingface_hub takes them from the environment: set HTTPS_PROXY",
}
"""What to do instead of some arguments that users expect."""


def unknown_arguments(arguments: Collection[str]) -> list[str]:
    """Return the names of arguments that a configuration or a model's class has to know."""
    return [name for name in arguments if name not in OF_TRANSFORMERS]


def check_arguments(
    arguments: Mapping[str, Any], config: PretrainedConfig, model_class: type[PreTrainedModel], ours: Collection[str]
) -> None:
    """Raise a `TypeError` for an argument that neither transformers nor the model's class takes.

    transformers passes all other arguments on: to the configuration if it has an attribute of this name, else to the
    class.

    Args:
        arguments: the arguments by name.
        config: the configuration of the model that will be loaded.
        model_class: its class.
        ours: the names of our own arguments, one of which may have been meant.
    """
    of_class = inspect.signature(model_class.__init__).parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in of_class.values())
    for name in unknown_arguments(arguments):
        if not hasattr(config, name) and name not in of_class and not takes_any:
            raise TypeError(_unknown_message(name, arguments[name], [*ours, *OF_TRANSFORMERS]))


def check_spelling(arguments: Mapping[str, Any], ours: Collection[str]) -> None:
    """Raise a `TypeError` for an argument whose nearest known name is ours, before the class of the model is known."""
    for name in unknown_arguments(arguments):
        if nearest(name, [*ours, *OF_TRANSFORMERS]) in ours:
            raise TypeError(_unknown_message(name, arguments[name], [*ours, *OF_TRANSFORMERS]))


def _unknown_message(name: str, value: object, known: Collection[str]) -> str:
    start = f"AutoMergedModel.from_pretrained has no argument {name!r}"
    methods = [method for method in METHODS if any(each.name == name for each in options_of(config_class(method)))]
    if methods:
        method = DEFAULT_METHOD if DEFAULT_METHOD in methods else methods[0]
        return f"{start}. Did you mean config={config_class(method).__name__}({name}={value!r:.50})?"
    if name in INSTEAD:
        return f"{start}: {INSTEAD[name]}."
    near = nearest(name, known)
    return start + (f". Did you mean {near!r}?" if near else ".")
