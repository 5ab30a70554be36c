"""Vision, speech and pairs of images and texts, from transformers."""

from typing import Any

import torch
from support.models.model_case import (
    CHANNELS,
    CLASSES,
    PICTURES,
    SEQ,
    SIDE,
    SIZES,
    VISION,
    Batch,
    ModelCase,
    Row,
    classes,
    drawn,
    generator,
    hf_cases,
    hf_model,
    images,
    numbers,
    tokens,
)
from torch import Tensor, nn

STAGES = {"depths": [1, 1], "hidden_sizes": [16, 32]}
CLASSIFIERS: tuple[Row, ...] = (
    ("vit", "ViTForImageClassification", {}),
    ("deit", "DeiTForImageClassification", {}),
    ("beit", "BeitForImageClassification", {}),
    ("data2vec vision", "Data2VecVisionForImageClassification", {}),
    ("dinov2", "Dinov2ForImageClassification", {}),
    ("dinov2 registers", "Dinov2WithRegistersForImageClassification", {}),
    ("vit msn", "ViTMSNForImageClassification", {}),
    ("ijepa", "IJepaForImageClassification", {}),
    ("hiera", "HieraForImageClassification", {
        "embed_dim": 16, "image_size": [SIDE, SIDE], "patch_size": [7, 7], "patch_stride": [4, 4],
        "patch_padding": [3, 3], "depths": [1, 1], "num_heads": [2, 4], "masked_unit_size": [4, 4], "num_query_pool": 1,
        "query_stride": [2, 2], "embed_dim_multiplier": 2.0}),
    ("mobilenet v1", "MobileNetV1ForImageClassification", {"depth_multiplier": 0.25}),
    ("mobilenet v2", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.25}),
    ("mobilevit", "MobileViTForImageClassification", {
        "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 16, 24, 32, 32], "patch_size": 2}),
)  # fmt: skip
STAGED: tuple[Row, ...] = (
    ("swin", "SwinForImageClassification", {
        "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}),
    ("swinv2", "Swinv2ForImageClassification", {
        "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}),
    ("convnext", "ConvNextForImageClassification", {
        "depths": [1, 1, 1], "hidden_sizes": [8, 16, 32], "num_stages": 3, "patch_size": 4}),
    ("convnextv2", "ConvNextV2ForImageClassification", {
        "depths": [1, 1, 1], "hidden_sizes": [8, 16, 32], "num_stages": 3, "patch_size": 4}),
    ("resnet hf", "ResNetForImageClassification", {**STAGES, "embedding_size": 16}),
    ("regnet", "RegNetForImageClassification", {**STAGES, "embedding_size": 16, "groups_width": 8}),
    ("bit", "BitForImageClassification", {**STAGES, "embedding_size": 16, "num_groups": 4}),
    ("efficientnet", "EfficientNetForImageClassification", {
        "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}),
    ("poolformer", "PoolFormerForImageClassification", {
        "depths": [1, 1], "hidden_sizes": [16, 32], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2],
        "padding": [2, 1], "patch_size": 7}),
    ("focalnet", "FocalNetForImageClassification", {
        "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32], "focal_levels": [2, 2], "focal_windows": [3, 3],
        "patch_size": 4}),
    ("segformer classes", "SegformerForImageClassification", {
        "depths": [1, 1], "hidden_sizes": [16, 32], "num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [7, 3],
        "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}),
    ("pvt", "PvtForImageClassification", {
        "depths": [1, 1], "hidden_sizes": [16, 32], "num_encoder_blocks": 2, "sequence_reduction_ratios": [2, 1],
        "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
        "drop_path_rate": 0.1}),
    ("cvt", "CvtForImageClassification", {
        "embed_dim": [16, 32, 32], "depth": [1, 2, 3], "num_heads": [1, 2, 4], "drop_path_rate": [0.0, 0.0, 0.1]}),
)  # fmt: skip
MAPS: tuple[Row, ...] = (
    ("segformer maps", "SegformerForSemanticSegmentation", {
        "depths": [1, 1], "hidden_sizes": [16, 32], "num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [7, 3],
        "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16}),
    ("mobilenet v2 maps", "MobileNetV2ForSemanticSegmentation", {"depth_multiplier": 0.25}),
    ("dpt", "DPTForSemanticSegmentation", {
        "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8,
        "num_hidden_layers": 4, "is_hybrid": False}),
)  # fmt: skip
WAVES: dict[str, Any] = {
    **SIZES, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16, "vocab_size": 16,
}  # fmt: skip
SOUNDS: tuple[Row, ...] = (
    ("wav2vec2 classes", "Wav2Vec2ForSequenceClassification", {}),
    ("hubert classes", "HubertForSequenceClassification", {}),
    ("wavlm classes", "WavLMForSequenceClassification", {}),
    ("data2vec audio classes", "Data2VecAudioForSequenceClassification", {}),
    ("wav2vec2 classes all layers", "Wav2Vec2ForSequenceClassification", {"layerdrop": 0.0}),
    ("wavlm classes all layers", "WavLMForSequenceClassification", {"layerdrop": 0.0}),
)
SPOKEN: tuple[Row, ...] = (
    ("wav2vec2 ctc", "Wav2Vec2ForCTC", {}),
    ("hubert ctc", "HubertForCTC", {}),
    ("wav2vec2 ctc no mask", "Wav2Vec2ForCTC", {"apply_spec_augment": False, "layerdrop": 0.0}),
    ("wav2vec2 ctc all layers", "Wav2Vec2ForCTC", {"layerdrop": 0.0}),
    ("hubert ctc all layers", "HubertForCTC", {"layerdrop": 0.0}),
)
TEXT = {**SIZES, "projection_dim": 16}
EYE = {**VISION, "projection_dim": 16}
TWINS: tuple[Row, ...] = (
    ("clip", "CLIPModel", {"projection_dim": 16}),
    ("siglip", "SiglipModel", {}),
    ("chinese clip", "ChineseCLIPModel", {"projection_dim": 16}),
    ("align", "AlignModel", {"projection_dim": 80, "vision_config": {
        "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 80, "image_size": SIDE}}),
)  # fmt: skip
SPECTRUM: tuple[Row, ...] = (
    (
        "audio spectrogram",
        "ASTForAudioClassification",
        {"num_mel_bins": 16, "max_length": 32, "patch_size": 8},
    ),
)


def label_maps(n: int) -> Batch:
    """Images, and a class of each pixel."""
    return images(n) | {"labels": classes(n, SIDE, SIDE)}


def sounds(n: int) -> Batch:
    """Waves, and a class of each."""
    return {"input_values": numbers(n, 200), "labels": classes(n)}


def spoken(n: int) -> Batch:
    """Waves, and what is said, of lengths that differ."""
    labels = torch.randint(3, 16, (n, 4), generator=generator(1))
    return {"input_values": numbers(n, 200), "labels": labels.masked_fill(
        torch.arange(4)[None] > torch.arange(n)[:, None] % 3 + 1, -100)}  # fmt: skip


def spectra(n: int) -> Batch:
    """Spectrograms, and a class of each."""
    return {"input_values": numbers(n, 32, 16), "labels": classes(n)}


def captioned(n: int) -> Batch:
    """Images and their texts."""
    ids = tokens(n)
    ids[:, -1] = 2
    return {"input_ids": ids, "pixel_values": numbers(n, CHANNELS, SIDE, SIDE), "return_loss": True}


def masked_images(n: int) -> Batch:
    """Images only: what is hidden is drawn by the model."""
    return {"pixel_values": numbers(n, CHANNELS, SIDE, SIDE)}


class Captioner(nn.Module):
    """An image encoder before a text decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.see = hf_model("ViTModel", VISION)
        self.say = hf_model("GPT2LMHeadModel", {**SIZES, "n_inner": 64, "add_cross_attention": True})

    def forward(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor) -> object:
        """The decoder's output."""
        seen = self.see(pixel_values).last_hidden_state
        return self.say(input_ids=input_ids, encoder_hidden_states=seen, labels=labels, use_cache=False)


def captions(n: int) -> Batch:
    """Images, and the texts to be told."""
    return {"pixel_values": numbers(n, CHANNELS, SIDE, SIDE), "input_ids": tokens(n), "labels": tokens(n)}


def cases() -> list[ModelCase]:
    """All of them."""
    assert CLASSES > 1 and SEQ > 1
    twins = {"text_config": TEXT, "vision_config": EYE}
    return [
        *hf_cases("image classes", CLASSIFIERS, VISION, images),
        *hf_cases("image classes", STAGED, PICTURES, images),
        *hf_cases("label maps", MAPS, VISION, label_maps),
        *hf_cases("masked images", [("vit mae", "ViTMAEForPreTraining", {
            "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32})], VISION, masked_images),
        *hf_cases("sounds", SOUNDS, WAVES, sounds),
        *hf_cases("sounds", SPOKEN, WAVES, spoken),
        *hf_cases("sounds", SPECTRUM, VISION, spectra),
        *hf_cases("contrastive", TWINS, twins, captioned),
        ModelCase("captioner", "image to text", lambda: drawn(Captioner), captions),
    ]  # fmt: skip
