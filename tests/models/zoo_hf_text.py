"""Text models of transformers: the encoders, and the list of all of them."""

from __future__ import annotations

import torch

from tests.models.entry import Entry
from tests.models.zoo_hf_text_2 import DECODERS
from tests.models.zoo_hf_text_3 import EXPERTS
from tests.models.zoo_hf_text_4 import TRANSLATORS
from tests.models.zoo_hf_text_kit import text

_WIDE = {"intermediate_size": 40}
_NO_POOLER = {"*.pooler.*": "the head for masked words does not read the pooler, which runs all the same"}

HF_TEXT: tuple[Entry, ...] = (
    text("bert", "BertForMaskedLM", **_WIDE),
    text("roberta", "RobertaForSequenceClassification", **_WIDE, max_position_embeddings=20),
    text("albert", "AlbertForMaskedLM", **_WIDE, embedding_size=16),
    text("electra", "ElectraForTokenClassification", **_WIDE, embedding_size=16),
    text("deberta", "DebertaForMaskedLM", **_WIDE, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    text(
        "deberta_v2",
        "DebertaV2ForSequenceClassification",
        **_WIDE,
        num_hidden_layers=1,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    ),
    text("mpnet", "MPNetForMaskedLM", **_WIDE),
    text("distilbert", "DistilBertForQuestionAnswering", hidden_dim=40),
    text("convbert", "ConvBertForMaskedLM", **_WIDE, embedding_size=16, conv_kernel_size=3),
    text("squeezebert", "SqueezeBertForSequenceClassification", **_WIDE, embedding_size=32),
    text(
        "mobilebert",
        "MobileBertForMaskedLM",
        **_WIDE,
        embedding_size=16,
        intra_bottleneck_size=16,
        num_feedforward_networks=2,
    ),
    text(
        "nystromformer",
        "NystromformerForMaskedLM",
        **_WIDE,
        num_landmarks=12,
        segment_means_seq_len=12,
        conv_kernel_size=5,
    ),
    text("fnet", "FNetForMaskedLM", **_WIDE, extra={"attention_mask": None}, unused=_NO_POOLER),
    text("roformer", "RoFormerForMaskedLM", **_WIDE, embedding_size=16),
    text(
        "longformer",
        "LongformerForMaskedLM",
        **_WIDE,
        length=8,
        num_hidden_layers=1,
        attention_window=4,
        max_position_embeddings=20,
        extra={"attention_mask": None, "global_attention_mask": torch.tensor([[1] + [0] * 7] * 2)},
    ),
    text(
        "big_bird",
        "BigBirdForMaskedLM",
        **_WIDE,
        length=16,
        attention_type="block_sparse",
        block_size=2,
        num_random_blocks=1,
        unused=_NO_POOLER,
        num_hidden_layers=1,
        max_position_embeddings=16,
    ),
    text("modernbert", "ModernBertForMaskedLM", **_WIDE, cls_token_id=1, sep_token_id=2),
    text(
        "funnel",
        "FunnelForMaskedLM",
        small={},
        vocab_size=100,
        block_sizes=[1, 1],
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=40,
        num_decoder_layers=1,
    ),
    text("xlnet", "XLNetLMHeadModel", small={}, vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=40),
    text("xlm", "XLMWithLMHeadModel", small={}, vocab_size=100, emb_dim=32, n_layers=2, n_heads=4, pad_token_id=0),
    text("rembert", "RemBertForMaskedLM", **_WIDE, input_embedding_size=16, output_embedding_size=24),
    text("ibert", "IBertForMaskedLM", **_WIDE, num_hidden_layers=1, max_position_embeddings=20),
    text(
        "luke",
        "LukeForMaskedLM",
        **_WIDE,
        max_position_embeddings=20,
        entity_vocab_size=10,
        entity_emb_size=16,
        unused=_NO_POOLER,
        extra={
            "entity_ids": torch.tensor([[1, 2], [3, 0]]),
            "entity_attention_mask": torch.tensor([[1, 1], [1, 0]]),
            "entity_position_ids": torch.tensor([[[1, 2, -1], [4, -1, -1]], [[0, -1, -1], [-1, -1, -1]]]),
        },
    ),
    text("yoso", "YosoForMaskedLM", **_WIDE, use_expectation=True),
    *DECODERS,
    *EXPERTS,
    *TRANSLATORS,
)
