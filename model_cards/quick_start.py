"""Code for a card that loads a merged model and uses it once."""

from neuromerge_hf.model_cards.tasks import Task

PIPELINES = {
    "text-generation": ("generate", '"Once upon a time", max_new_tokens=30'),
    "text-classification": ("classify", '"What a pleasant surprise."'),
    "token-classification": ("tag", '"Ada Lovelace lived in London."'),
    "fill-mask": ("fill", 'f"Lisbon is the {fill.tokenizer.mask_token} of Portugal."'),
}
"""The name of a pipeline's variable and its example arguments, by task."""

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
"""The tokenizer's example arguments and the lines after it, by Auto class, for tasks without a pipeline."""

CHAT = '[{"role": "user", "content": "Tell me a story."}], max_new_tokens=30'


def quick_start(task: Task, model: str, *, has_tokenizer: bool, has_chat: bool = False, own_code: bool = False) -> str:
    """A few lines of Python that use the model.

    Args:
        task: the task of the model.
        model: the id or path for `from_pretrained`.
        has_tokenizer: whether the model has a tokenizer, and text is all the input that it needs.
        has_chat: whether the model has a chat template.
        own_code: whether loading the model runs custom code from its folder.
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


def sentence_start(model: str, *, own_code: bool = False) -> str:
    """The lines of Python that compare two sentences by a SentenceTransformer."""
    return "\n".join(
        [
            "from sentence_transformers import SentenceTransformer",
            "",
            f"model = SentenceTransformer({quoted(model)}{_trust(own_code)})",
            'embeddings = model.encode(["The weather is lovely today.", "It is so sunny outside!"])',
            "print(model.similarity(embeddings, embeddings))",
        ]
    )


def head_start(model: str, head: str, *, own_code: bool = False) -> str:
    """The lines of Python that load the merged weights with one expert's own head."""
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
    """The text as a string literal of Python in ASCII."""
    literal = ascii(text)
    return literal if '"' in literal or "\\" in literal else f'"{literal[1:-1]}"'
