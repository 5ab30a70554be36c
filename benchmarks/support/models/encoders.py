"""Encoders with heads for tasks, and encoder-decoders."""

from functools import partial
from typing import Any

from support.models.model_case import (
    SEQ,
    SIZES,
    Batch,
    ModelCase,
    Row,
    answers,
    hf_cases,
    masked_language,
    numbers,
    pairs,
    sequence_classes,
    token_classes,
)

MASKED: tuple[Row, ...] = (
    ("bert mlm", "BertForMaskedLM", {}),
    ("roberta mlm", "RobertaForMaskedLM", {}),
    ("distilbert mlm", "DistilBertForMaskedLM", {"hidden_dim": 64}),
    ("electra mlm", "ElectraForMaskedLM", {"embedding_size": 16}),
    ("albert mlm", "AlbertForMaskedLM", {"embedding_size": 16, "classifier_dropout_prob": 0.1}),
    ("deberta mlm", "DebertaForMaskedLM", {}),
    ("deberta v2 mlm", "DebertaV2ForMaskedLM", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    ("mpnet mlm", "MPNetForMaskedLM", {}),
    ("modernbert mlm", "ModernBertForMaskedLM", {"local_attention": 4, "global_attn_every_n_layers": 2}),
    ("camembert mlm", "CamembertForMaskedLM", {}),
    ("convbert mlm", "ConvBertForMaskedLM", {"embedding_size": 32, "conv_kernel_size": 3}),
    ("squeezebert mlm", "SqueezeBertForMaskedLM", {"embedding_size": 32}),
    ("fnet mlm", "FNetForMaskedLM", {}),
    ("mobilebert mlm", "MobileBertForMaskedLM", {
        "embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16}),
    ("esm mlm", "EsmForMaskedLM", {"mask_token_id": 3, "position_embedding_type": "rotary"}),
    ("megatron bert mlm", "MegatronBertForMaskedLM", {}),
    ("nystromformer mlm", "NystromformerForMaskedLM", {
        "num_landmarks": 8, "segment_means_seq_len": 8, "conv_kernel_size": 3}),
    ("longformer mlm", "LongformerForMaskedLM", {"attention_window": 4}),
    ("big bird mlm", "BigBirdForMaskedLM", {}),
)  # fmt: skip
XL: dict[str, Any] = {
    "vocab_size": 96, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "d_model": 32,
    "n_head": 4,
}  # fmt: skip
LONG = {**XL, "n_layer": 2, "d_inner": 64}
SEQUENCES: tuple[Row, ...] = (
    ("bert classes", "BertForSequenceClassification", {}),
    ("roberta classes", "RobertaForSequenceClassification", {}),
    ("distilbert classes", "DistilBertForSequenceClassification", {"hidden_dim": 64}),
    ("electra classes", "ElectraForSequenceClassification", {"embedding_size": 16}),
    ("albert classes", "AlbertForSequenceClassification", {"embedding_size": 16}),
    ("deberta v2 classes", "DebertaV2ForSequenceClassification", {"pooler_hidden_size": 32}),
    ("modernbert classes", "ModernBertForSequenceClassification", {"local_attention": 4}),
    ("gpt2 classes", "GPT2ForSequenceClassification", {"n_inner": 64}),
    ("llama classes", "LlamaForSequenceClassification", {"num_key_value_heads": 2}),
)  # fmt: skip
UNBOUNDED: tuple[Row, ...] = (
    ("xlnet classes", "XLNetForSequenceClassification", LONG),
    ("funnel classes", "FunnelForSequenceClassification", {
        **XL, "block_sizes": [1, 1], "d_head": 8, "d_inner": 64, "num_decoder_layers": 1}),
)  # fmt: skip
TOKENS: tuple[Row, ...] = (
    ("bert tokens", "BertForTokenClassification", {}),
    ("roberta tokens", "RobertaForTokenClassification", {}),
    ("deberta v2 tokens", "DebertaV2ForTokenClassification", {}),
    ("camembert tokens", "CamembertForTokenClassification", {}),
)
QUESTIONS: tuple[Row, ...] = (
    ("bert answers", "BertForQuestionAnswering", {}),
    ("distilbert answers", "DistilBertForQuestionAnswering", {"hidden_dim": 64}),
    ("mpnet answers", "MPNetForQuestionAnswering", {}),
    ("albert answers", "AlbertForQuestionAnswering", {"embedding_size": 16}),
)
BOTH: dict[str, Any] = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
TRANSLATORS: tuple[Row, ...] = (
    ("bart", "BartForConditionalGeneration", {}),
    ("mbart", "MBartForConditionalGeneration", {}),
    ("pegasus", "PegasusForConditionalGeneration", {}),
    ("marian", "MarianMTModel", {"decoder_vocab_size": 96}),
    ("m2m 100", "M2M100ForConditionalGeneration", {}),
    ("blenderbot", "BlenderbotForConditionalGeneration", {}),
    ("plbart", "PLBartForConditionalGeneration", {}),
    ("nllb moe", "NllbMoeForConditionalGeneration", {
        "num_experts": 4, "expert_capacity": 8, "encoder_sparse_step": 2, "decoder_sparse_step": 2}),
)  # fmt: skip
T5S: tuple[Row, ...] = (
    ("t5", "T5ForConditionalGeneration", {}),
    ("t5 gated", "T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ("mt5", "MT5ForConditionalGeneration", {}),
    ("umt5", "UMT5ForConditionalGeneration", {}),
    ("switch", "SwitchTransformersForConditionalGeneration", {
        "num_experts": 4, "expert_capacity": 8, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
    ("longt5", "LongT5ForConditionalGeneration", {"local_radius": 3}),
)  # fmt: skip
MELS, FRAMES = 8, 16
SPEECH: tuple[Row, ...] = (
    ("whisper", "WhisperForConditionalGeneration", {
        "num_mel_bins": MELS, "max_source_positions": FRAMES // 2, "max_target_positions": 32}),
    ("speech to text", "Speech2TextForConditionalGeneration", {
        "input_feat_per_channel": MELS, "input_channels": 1, "max_source_positions": 64, "conv_channels": 32,
        "max_target_positions": 32}),
)  # fmt: skip


def heard(n: int, *, frames_first: bool) -> Batch:
    """Spectrograms, and what is said."""
    shape = (FRAMES, MELS) if frames_first else (MELS, FRAMES)
    return {"input_features": numbers(n, *shape), "labels": pairs(n)["labels"]}


def cases() -> list[ModelCase]:
    """All of them."""
    assert SEQ > 3
    whisper, s2t = SPEECH
    return [
        *hf_cases("masked lm", MASKED, SIZES, masked_language),
        *hf_cases("sequence classes", SEQUENCES, SIZES, sequence_classes),
        *hf_cases("token classes", TOKENS, SIZES, token_classes),
        *hf_cases("sequence classes", UNBOUNDED, {}, sequence_classes),
        *hf_cases(
            "token classes", [("xlnet tokens", "XLNetForTokenClassification", LONG)], {}, token_classes
        ),
        *hf_cases("answers", QUESTIONS, {**SIZES, "num_labels": 2}, answers),
        *hf_cases("encoder-decoder", TRANSLATORS, BOTH, pairs),
        *hf_cases("encoder-decoder", T5S, T5, pairs),
        *hf_cases("speech", [whisper], BOTH, partial(heard, frames_first=False)),
        *hf_cases("speech", [s2t], BOTH, partial(heard, frames_first=True)),
    ]
