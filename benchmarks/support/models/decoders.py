"""Decoders: next-token models with attention, experts or states."""

from support.models.model_case import EXPERTS, SINGLE, SIZES, ModelCase, Row, hf_cases, language

GROUPED = {"num_key_value_heads": 2}
DECODERS: tuple[Row, ...] = (
    ("llama", "LlamaForCausalLM", GROUPED),
    ("llama tied", "LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    ("mistral", "MistralForCausalLM", {**GROUPED, "sliding_window": 4}),
    ("ministral", "MinistralForCausalLM", {**GROUPED, "head_dim": 8}),
    ("qwen2", "Qwen2ForCausalLM", GROUPED),
    ("qwen3", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    ("gemma", "GemmaForCausalLM", {**GROUPED, "head_dim": 8}),
    ("gemma2", "Gemma2ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 4}),
    ("gemma3", "Gemma3ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 4}),
    ("phi", "PhiForCausalLM", {}),
    ("phi3", "Phi3ForCausalLM", GROUPED),
    ("gpt2", "GPT2LMHeadModel", {"n_inner": 64}),
    ("gpt neo", "GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    ("gpt neox", "GPTNeoXForCausalLM", {}),
    ("gptj", "GPTJForCausalLM", {"rotary_dim": 4}),
    ("gpt bigcode", "GPTBigCodeForCausalLM", {}),
    ("codegen", "CodeGenForCausalLM", {"rotary_dim": 4}),
    ("openai gpt", "OpenAIGPTLMHeadModel", {}),
    ("opt", "OPTForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    ("bloom", "BloomForCausalLM", {}),
    ("falcon", "FalconForCausalLM", {}),
    ("falcon alibi", "FalconForCausalLM", {"alibi": True, "new_decoder_architecture": True, **GROUPED}),
    ("mpt", "MptForCausalLM", {}),
    ("stablelm", "StableLmForCausalLM", GROUPED),
    ("olmo", "OlmoForCausalLM", GROUPED),
    ("olmo2", "Olmo2ForCausalLM", GROUPED),
    ("olmo3", "Olmo3ForCausalLM", {**GROUPED, "sliding_window": 4}),
    ("cohere", "CohereForCausalLM", GROUPED),
    ("cohere2", "Cohere2ForCausalLM", {**GROUPED, "sliding_window": 4}),
    ("starcoder2", "Starcoder2ForCausalLM", GROUPED),
    ("granite", "GraniteForCausalLM", GROUPED),
    ("glm4", "Glm4ForCausalLM", {**GROUPED, "head_dim": 8}),
    ("smollm3", "SmolLM3ForCausalLM", GROUPED),
    ("persimmon", "PersimmonForCausalLM", {}),
    ("nemotron", "NemotronForCausalLM", GROUPED),
    ("helium", "HeliumForCausalLM", {**GROUPED, "head_dim": 8}),
    (
        "xglm",
        "XGLMForCausalLM",
        {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, **SINGLE},
    ),
    ("biogpt", "BioGptForCausalLM", {}),
    ("ctrl", "CTRLLMHeadModel", {"dff": 64}),
)
BATCHED = {EXPERTS: "batched_mm"}
FEW = {**BATCHED, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    **BATCHED, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
MIXTURES: tuple[Row, ...] = (
    ("mixtral", "MixtralForCausalLM", {**GROUPED, **BATCHED, "num_local_experts": 4}),
    ("mixtral balanced", "MixtralForCausalLM", {
        **GROUPED, **BATCHED, "num_local_experts": 4, "output_router_logits": True}),
    ("qwen2 moe", "Qwen2MoeForCausalLM", {**GROUPED, **FEW, "shared_expert_intermediate_size": 16}),
    ("qwen3 moe", "Qwen3MoeForCausalLM", {**GROUPED, **FEW, "head_dim": 8}),
    ("olmoe", "OlmoeForCausalLM", {**GROUPED, **BATCHED, "num_experts": 4, "num_experts_per_tok": 2}),
    ("granite moe", "GraniteMoeForCausalLM", {**GROUPED, **BATCHED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("phimoe", "PhimoeForCausalLM", {**GROUPED, **BATCHED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("gpt oss", "GptOssForCausalLM", {
        **GROUPED, "head_dim": 8, **BATCHED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    ("deepseek v2", "DeepseekV2ForCausalLM", {**LATENT, "topk_method": "greedy"}),
    ("deepseek v3", "DeepseekV3ForCausalLM", LATENT),
    ("mixtral grouped", "MixtralForCausalLM", {**GROUPED, "num_local_experts": 4, **SINGLE}),
    ("mixtral eager", "MixtralForCausalLM", {**GROUPED, "num_local_experts": 4, EXPERTS: "eager"}),
)  # fmt: skip
STATES = {"state_size": 4, "conv_kernel": 4, "expand": 2, "time_step_rank": 2}
RECURRENT: tuple[Row, ...] = (
    ("mamba", "MambaForCausalLM", STATES),
    ("mamba2", "Mamba2ForCausalLM", {
        "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2, "chunk_size": 4}),
    ("falcon mamba", "FalconMambaForCausalLM", STATES),
    ("rwkv", "RwkvForCausalLM", {"attention_hidden_size": 32, "context_length": 32}),
    ("recurrent gemma", "RecurrentGemmaForCausalLM", {
        "lru_width": 32, "attention_window_size": 4, "num_hidden_layers": 3, "block_types": (
            "recurrent", "recurrent", "attention"), "num_key_value_heads": 1, "head_dim": 8}),
    ("jamba", "JambaForCausalLM", {
        **GROUPED, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False, **BATCHED}),
)  # fmt: skip


def cases() -> list[ModelCase]:
    """All of them."""
    kinds = (("decoder", DECODERS), ("experts", MIXTURES), ("state space", RECURRENT))
    return [case for kind, rows in kinds for case in hf_cases(kind, rows, SIZES, language)]
