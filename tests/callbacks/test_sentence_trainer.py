"""NeuroMergeCallback works in the trainer of sentence-transformers: merges, modules, evaluation."""

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from neuromerge_hf import NeuroMergeCallback
from neuromerge_hf.folder.report import load_report
from tiny_models import save_bert, save_fine_tune, save_tokenizer
from tiny_training import MERGED, TRAINED, logged

PAIRS = {"sentence1": ["the quick"] * 4, "sentence2": ["brown fox", "lazy dog"] * 2, "score": [0.9, 0.1] * 2}
TEXTS = ["the quick brown fox", "the lazy dog"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    encoder = save_bert(folder / "encoder")
    modules = [Transformer(str(encoder)), Pooling(24, pooling_mode="max"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "base"))
    other = save_fine_tune(encoder, folder / "other", seed=1)
    save_tokenizer(other)
    return folder / "base", other


def evaluator():
    return EmbeddingSimilarityEvaluator(PAIRS["sentence1"], PAIRS["sentence2"], PAIRS["score"], write_csv=False)


def make_trainer(model, folder, *callbacks, **settings):
    args = SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Dataset.from_dict(PAIRS)
    loss = CosineSimilarityLoss(model)
    return SentenceTransformerTrainer(
        model, args, train_dataset=data, loss=loss, evaluator=evaluator(), callbacks=list(callbacks), **settings
    )


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("has_data", [False, True])
def test_the_trained_model_is_merged_and_measured(models, tmp_path, adapter, has_data):
    base, other = models
    model = SentenceTransformer(str(base), device="cpu")
    if adapter:
        model.add_adapter(LoraConfig(target_modules=["query", "value"]))
    callback = NeuroMergeCallback([other])
    data = {"eval_dataset": Dataset.from_dict(PAIRS)} if has_data else {}
    trainer = make_trainer(model, tmp_path, callback, **data)
    trainer.train()
    assert load_report(tmp_path / MERGED).experts[0].kind == ("LoRA r=8" if adapter else "full")
    trained = SentenceTransformer(str(tmp_path / TRAINED), device="cpu")
    assert np.allclose(model.encode(TEXTS), trained.encode(TEXTS), atol=1e-6), "the model has its own weights again"

    merged = SentenceTransformer(str(tmp_path / MERGED), device="cpu")
    assert [type(module).__name__ for module in merged] == ["Transformer", "Pooling", "Normalize"]
    metric = "pearson_cosine"
    assert callback.metrics[f"merged_eval_{metric}"] == pytest.approx(evaluator()(merged)[metric], abs=1e-6)
    assert callback.metrics[f"merged_eval_{metric}"] != callback.metrics[f"eval_{metric}"]
    assert bool(logged(trainer, "merged_eval_loss")) == has_data
