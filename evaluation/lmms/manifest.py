"""Where lmms-eval finds the adapter: the entry point `trimmed_llama` of the group `lmms_eval.models`.

lmms-eval loads this while its own modules are half imported; the adapter, which imports them, is only named.
"""


def manifest():
    """The ModelManifest of `lmms-eval --model trimmed_llama`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # here, because the core works without lmms-eval

    return ModelManifest("trimmed_llama", simple_class_path="evaluation.lmms.adapter.TrimmedLlama")
