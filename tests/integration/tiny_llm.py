"""A Llama of two layers with random weights, and a byte-level tokenizer trained on the spot: an LLM that talks nonsense."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

CORPUS = [
    "List what a person can see in a picture of melanoma: colour, shape, texture, border, size and place.",
    '{"symptoms": ["jagged uneven border", "many colours in one spot"]}',
]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_llm(folder: Path, context_length: int = 8192) -> Path:
    """Write config, safetensors weights and tokenizer to `folder`, all from one seed; returns `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # every byte, so control characters and any script too
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=context_length,
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)

    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        initializer_range=0.2,  # so large that what it says depends on what it is asked
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context_length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
