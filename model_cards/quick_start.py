"""Code that loads a merged model and uses it once, to be pasted."""

from neuromerge_hf.model_cards.tasks import Task

PIPELINES = {
    "text-generation": ("generate", '"Once upon a time", max_new_tokens=30'),
    "text-classification": ("classify", '"What a pleasant surprise."'),
    "token-classification": ("tag", '"Ada Lovelace lived in London."'),
    "fill-mask": ("fill", 'f"Lisbon is the {fill.tokenizer.mask_token} of Portugal."'),
}
"""What a pipeline is called, and what it is called with, by its task."""

USES = {
    "AutoModel": ('"A sentence."', ["print(model(**inputs).last_hidden_state.shape)"]),
    "AutoModelForSeq2SeqLM": (
        '"A sentence."',
        ["print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=30)))"],
    ),
    "AutoModelForQuestionAnswering": (
        '"Where did she live?", "Ada Lovelace lived in London."',
        [
            "outputs = model(**inputs)",
            "answer = slice(outputs.start_logits.argmax(), outputs.end_logits.argmax() + 1)",
            "print(tokenizer.decode(inputs.input_ids[0, answer]))",
        ],
    ),
}
"""What the tokenizer is called with, and what is done then, by the Auto class, where there is no pipeline."""

CHAT = '[{"role": "user", "content": "Tell me a story."}], max_new_tokens=30'


def quick_start(task: Task, model: str, *, has_tokenizer: bool, has_chat: bool = False, own_code: bool = False) -> str:
    """A few lines of Python that use the model.

    Args:
        task: what the model is for.
        model: what `from_pretrained` takes.
        has_tokenizer: whether the tokenizer is beside the weights, and a text is all that the model needs.
        has_chat: whether it has a chat template.
        own_code: whether the model's class is in its own folder.
    """
    name = quoted(model)
    trust = _trust(own_code)
    if has_tokenizer and task.pipeline_tag in PIPELINES:
        call, example = PIPELINES[task.pipeline_tag]
        return "\n".join(
            [
                "from transformers import pipeline",
                "",
                f'{call} = pipeline("{task.pipeline_tag}", {name}{trust})',
                f"print({call}({CHAT if has_chat and task.pipeline_tag == 'text-generation' else example}))",
            ]
        )
    if has_tokenizer and task.auto_class in USES:
        example, use = USES[task.auto_class]
        return "\n".join(
            [
                f"from transformers import {task.auto_class}, AutoTokenizer",
                "",
                f"tokenizer = AutoTokenizer.from_pretrained({name}{trust})",
                f"model = {task.auto_class}.from_pretrained({name}{trust})",
                f'inputs = tokenizer({example}, return_tensors="pt")',
                *use,
            ]
        )
    return "\n".join(
        [
            f"from transformers import {task.auto_class}",
            "",
            f"model = {task.auto_class}.from_pretrained({name}{trust})",
        ]
    )


def head_start(model: str, head: str, *, own_code: bool = False) -> str:
    """The lines that load the merged weights under one expert's own head."""
    where = f"{quoted(model)}, head={quoted(head)}{_trust(own_code)}"
    return "\n".join(
        [
            "from neuromerge_hf import AutoMergedModel  # pip install neuromerge-hf",
            "",
            f"model = AutoMergedModel.from_pretrained({where})",
        ]
    )


def _trust(own_code: bool) -> str:
    return ", trust_remote_code=True" if own_code else ""


def quoted(text: str) -> str:
    """A string of Python, in ASCII."""
    literal = ascii(text)
    return literal if '"' in literal or "\\" in literal else f'"{literal[1:-1]}"'
