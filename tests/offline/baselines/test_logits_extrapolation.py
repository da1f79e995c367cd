import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from relex_verl.offline.baselines.logits_extrapolation import LogitsExtrapolation, generate_extrapolated

PROMPTS = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(0))
NEW = 8


def tiny_model(seed, vocabulary=40):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models():
    return tiny_model(0), tiny_model(1)


@torch.no_grad()
def next_distribution(models, sequence, factor, temperature, top_p):
    """Of one unpadded sequence: both models on all of it, without any cache; the definition, token by token."""
    first, last = (model(sequence.unsqueeze(0)).logits[0, -1].double() for model in models)
    probability = torch.softmax((first + factor * (last - first)) / temperature, dim=-1)
    kept, total = torch.zeros_like(probability), 0.0
    for token in probability.argsort(descending=True).tolist():
        if total >= top_p:
            break
        kept[token] = probability[token]
        total += probability[token].item()
    return kept / kept.sum()


def greedy_by_hand(models, prompt, factor):
    sequence = prompt
    while len(sequence) < len(prompt) + NEW:
        token = next_distribution(models, sequence, factor, 1.0, 1.0).argmax()
        sequence = torch.cat([sequence, token.view(1)])
        if token == 2:
            break
    return sequence.tolist()


def without_padding(sequence, prompt_length):
    """Up to and with the first end token after the prompt."""
    generated = sequence[prompt_length:].tolist()
    end = generated.index(2) + 1 if 2 in generated else len(generated)
    return sequence[:prompt_length].tolist() + generated[:end]


@pytest.mark.parametrize("steps", [(0, 10, 5), (0, 10, 10), (0, 10, 25), (10, 20, 0)])
def test_greedy_decoding_is_that_of_the_combined_logits(models, steps):
    found = generate_extrapolated(*models, PROMPTS, steps, do_sample=False, max_new_tokens=NEW)
    factor = (steps[2] - steps[0]) / (steps[1] - steps[0])
    for prompt, sequence in zip(PROMPTS, found, strict=True):
        assert without_padding(sequence, 5) == greedy_by_hand(models, prompt, factor)


def test_factor_one_is_the_last_model_and_factor_zero_the_first(models):
    for model, target in zip(models, (0, 10), strict=True):
        found = generate_extrapolated(*models, PROMPTS, (0, 10, target), do_sample=False, max_new_tokens=NEW)
        mask = torch.ones_like(PROMPTS)
        assert torch.equal(found, model.generate(PROMPTS, attention_mask=mask, do_sample=False, max_new_tokens=NEW))


def test_left_padding_changes_nothing(models):
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), PROMPTS], dim=1)
    padded[1, :3] = torch.tensor([7, 8, 9])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    options = {"do_sample": False, "max_new_tokens": NEW}
    found = generate_extrapolated(*models, padded, (0, 10, 25), attention_mask=mask, **options)
    assert without_padding(found[0, 3:], 5) == greedy_by_hand(models, PROMPTS[0], 2.5)
    assert without_padding(found[1], 8) == greedy_by_hand(models, padded[1], 2.5)


def test_sampling_draws_from_the_combined_then_cooled_then_cut_distribution(models):
    torch.manual_seed(5)
    found = generate_extrapolated(*models, PROMPTS, (0, 10, 20), temperature=0.7, top_p=0.8, max_new_tokens=NEW)
    torch.manual_seed(5)
    sequences, done = [*PROMPTS], [False, False]
    for _ in range(found.shape[1] - PROMPTS.shape[1]):
        rows = torch.stack([next_distribution(models, one, 2.0, 0.7, 0.8) for one in sequences]).float()
        for i, token in enumerate(torch.multinomial(rows, 1).squeeze(1)):
            sequences[i] = torch.cat([sequences[i], (torch.zeros_like(token) if done[i] else token).view(1)])
            done[i] = done[i] or token.item() == 2
    assert torch.equal(found, torch.stack(sequences))


def test_several_samples_a_prompt_and_the_same_seed_give_the_same_tokens(models):
    def draw(seed):
        torch.manual_seed(seed)
        padded, mask = torch.cat([torch.zeros(2, 1, dtype=torch.int64), PROMPTS], dim=1), torch.ones(2, 6)
        mask[:, 0] = 0
        return generate_extrapolated(
            *models, padded, (0, 10, 20), attention_mask=mask.long(), num_return_sequences=4, max_new_tokens=NEW
        )

    one, two, other = draw(0), draw(0), draw(1)
    assert len(one) == 8
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def scores_of(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits[:, -1].float()


def test_the_processor_with_generates_own_warpers_off(models):
    processor = LogitsExtrapolation(models[0], 2.5)
    mask = torch.ones_like(PROMPTS)
    found = models[1].generate(
        PROMPTS, attention_mask=mask, logits_processor=[processor], do_sample=False, max_new_tokens=NEW
    )
    for prompt, sequence in zip(PROMPTS, found, strict=True):
        assert without_padding(sequence, 5) == greedy_by_hand(models, prompt, 2.5)


def test_the_cache_is_used_and_is_dropped_when_the_sequences_are_others(models):
    lengths = []
    first = models[0]
    hook = first.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    processor = LogitsExtrapolation(first, 2.0)
    longer = torch.cat([PROMPTS, torch.tensor([[4], [5]])], dim=1)
    swapped = torch.cat([longer.flip(0), torch.tensor([[6], [7]])], dim=1)
    for ids in (PROMPTS, longer, swapped, PROMPTS, PROMPTS[:1]):
        scores = scores_of(models[1], ids)
        expected = 2 * scores - _plain(first, ids, lengths)
        torch.testing.assert_close(processor(ids, scores), expected, rtol=1e-4, atol=1e-4)
    hook.remove()
    assert lengths == [5, 1, 7, 5, 5]


def _plain(model, ids, lengths):
    """The model's logits without counting the call."""
    before = len(lengths)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -1].float()
    del lengths[before:]
    return logits


def test_beam_search(models):
    options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 4}
    found = generate_extrapolated(*models, PROMPTS, (0, 10, 10), **options)
    assert torch.equal(found, models[1].generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), **options))


def test_own_generation_settings_of_a_model_do_not_interfere(models):
    options = {"temperature": 0.7, "top_p": 0.8, "max_new_tokens": NEW}
    torch.manual_seed(3)
    plain = generate_extrapolated(*models, PROMPTS, (0, 10, 20), **options)
    other = tiny_model(1)
    other.generation_config.update(temperature=0.1, top_k=2, repetition_penalty=1.5, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(generate_extrapolated(models[0], other, PROMPTS, (0, 10, 20), **options), plain)
    assert other.generation_config.repetition_penalty == 1.5


def test_refusals(models):
    with pytest.raises(ValueError, match="top_k would warp"):
        generate_extrapolated(*models, PROMPTS, (0, 10, 20), top_k=5)
    with pytest.raises(ValueError, match="vocabularies differ"):
        generate_extrapolated(models[0], tiny_model(1, 41), PROMPTS, (0, 10, 20))
    with pytest.raises(ValueError, match="later than the first"):
        generate_extrapolated(*models, PROMPTS, (10, 10, 20))
    with pytest.raises(ValueError, match="top_p"):
        LogitsExtrapolation(models[0], 2.0, top_p=0.0)
    with pytest.raises(ValueError, match="temperature"):
        LogitsExtrapolation(models[0], 2.0, temperature=-1.0)
    with pytest.raises(ValueError, match="attention mask is of 2 prompts"):
        LogitsExtrapolation(models[0], 2.0, attention_mask=torch.ones(2, 5))(PROMPTS[:1], torch.zeros(1, 40))
