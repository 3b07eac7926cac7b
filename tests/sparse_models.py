"""Sparse encoders with random weights, saved as folders: SPLADE, inference-free SPLADE, CSR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests import tiny_models as models

__all__ = ["save_csr", "save_inference_free", "save_splade"]


def masked_language_model(architecture: str = "bert", seed: int = 0, bias: float = -1.0, **config: Any) -> Any:
    """Random weights; `bias` is that of every word, so that rows are sparse as a trained model's are."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = transformers.AutoModelForMaskedLM.from_config(models.tiny_config(architecture, **config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.get_output_embeddings().bias.copy_(bias + 0.3 * torch.randn(model.config.vocab_size))
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def splade_modules(folder: Path, architecture: str = "bert", *, max_length: int = 256, **options: Any) -> list[Any]:
    """[Transformer with its head, SpladePooling]. options: of SpladePooling, or of :func:`masked_language_model`."""
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    names = ("pooling_strategy", "activation_function")
    pooling = {name: options.pop(name) for name in names if name in options}
    inner = folder / "mlm"
    inner.mkdir(parents=True, exist_ok=True)
    masked_language_model(architecture, **options).save_pretrained(inner)
    models.save_tokenizer(inner, architecture, max_length)
    return [Transformer(str(inner), transformer_task="fill-mask"), SpladePooling(**pooling)]


def save_splade(folder: Path, architecture: str = "bert", **options: Any) -> str:
    """A SPLADE folder. prompts, max_active_dims: of SparseEncoder; else see :func:`splade_modules`."""
    from sentence_transformers import SparseEncoder

    own = {name: options.pop(name) for name in ("prompts", "max_active_dims") if name in options}
    model = SparseEncoder(modules=splade_modules(folder, architecture, **options), device="cpu", **own)
    model.save(str(folder / "splade"))
    return str(folder / "splade")


def save_inference_free(folder: Path, **options: Any) -> str:
    """Queries by a table of weights, documents by SPLADE: a Router."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

    documents = splade_modules(folder, **options)
    weight = torch.rand(30522, generator=torch.Generator().manual_seed(3))
    weight[::7] = 0
    queries = [SparseStaticEmbedding(tokenizer=documents[0].tokenizer, weight=weight)]
    router = Router.for_query_document(query_modules=queries, document_modules=documents)
    SparseEncoder(modules=[router], device="cpu").save(str(folder / "free"))
    return str(folder / "free")


def save_csr(folder: Path, **options: Any) -> str:
    """Sparse codes of dense embeddings: 16 of 256."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    inner = models.save_embedder(folder / "dense", **options)
    transformer = Transformer(str(inner))
    width = transformer.get_embedding_dimension()
    codes = SparseAutoEncoder(input_dim=width, hidden_dim=256, k=16)
    SparseEncoder(modules=[transformer, Pooling(width), codes], device="cpu").save(str(folder / "csr"))
    return str(folder / "csr")


def save_late_interaction(folder: Path, architecture: str = "bert", *, expansion: bool = True, **options: Any) -> str:
    """ColBERT's shape: a projection without bias to 16 numbers, punctuation left out of documents, vectors of length 1; with
    `expansion` queries of twelve tokens, filled up with [MASK]."""
    import string

    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    inner = folder / "encoder"
    inner.mkdir(parents=True, exist_ok=True)
    own = {"prompts": options.pop("prompts")} if "prompts" in options else {}
    models.tiny_model(models.tiny_config(architecture, **options)).save_pretrained(inner)
    models.save_tokenizer(inner, architecture, 256)
    query = {"query_expansion": {"strategy": "fixed", "attend": False, "length": 12}} if expansion else {}
    transformer = Transformer(str(inner), document_length=200, **query)
    generator = torch.Generator().manual_seed(5)
    width = transformer.get_embedding_dimension()
    names = {"module_input_name": "token_embeddings"}
    weight = torch.randn(16, width, generator=generator) / width**0.5
    dense = Dense(width, 16, bias=False, activation_function=torch.nn.Identity(), init_weight=weight, **names)
    mask = MultiVectorMask(skiplist_words=list(string.punctuation))
    model = MultiVectorEncoder(modules=[transformer, dense, mask, Normalize(**names)], device="cpu", **own)
    model.save(str(folder / "colbert"))
    return str(folder / "colbert")


def save_m3(folder: Path, architecture: str = "xlm_roberta", *, seed: int = 0, **options: Any) -> str:
    """BGE-M3's shape: an embedding model with ``sparse_linear.pt`` and ``colbert_linear.pt`` beside its weights."""
    path = models.save_embedder(folder, architecture, pooling="cls", normalize=True, seed=seed, **options)
    width = models.tiny_config(architecture, **{k: v for k, v in options.items() if k == "hidden_size"}).hidden_size
    generator = torch.Generator().manual_seed(seed + 7)
    for name, rows in (("sparse_linear.pt", 1), ("colbert_linear.pt", width)):
        weight = torch.randn(rows, width, generator=generator) / width**0.5
        bias = torch.randn(rows, generator=generator) * 0.1
        torch.save({"weight": weight, "bias": bias}, path / name)
    return str(path)


def m3_reference(folder: str, text: str) -> dict[str, Any]:
    """What FlagEmbedding's ``BGEM3FlagModel.encode`` computes for `text` alone, written down from its code: dense_vecs,
    lexical_weights (by token id) and colbert_vecs."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    linear = {}
    for name in ("sparse", "colbert"):
        state = torch.load(f"{folder}/{name}_linear.pt", weights_only=True)
        linear[name] = torch.nn.Linear(state["weight"].shape[1], state["weight"].shape[0])
        linear[name].load_state_dict(state)
    inputs = tokenizer([text], truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**inputs, return_dict=True).last_hidden_state
        weights = torch.relu(linear["sparse"](hidden))[0, :, 0].tolist()
        vectors = linear["colbert"](hidden[:, 1:])
        vectors = vectors * inputs["attention_mask"][:, 1:][:, :, None].float()
        normal = torch.nn.functional.normalize
        dense, colbert = normal(hidden[:, 0], dim=-1)[0], normal(vectors, dim=-1)[0]
    unused = {getattr(tokenizer, f"{name}_token_id") for name in ("cls", "eos", "pad", "unk")}
    lexical: dict[int, float] = {}
    for weight, token in zip(weights, inputs["input_ids"][0].tolist(), strict=True):
        if token not in unused and weight > 0:
            lexical[token] = max(lexical.get(token, 0.0), weight)
    return {"dense": dense.numpy(), "sparse": lexical, "multi_vector": colbert.numpy()}
