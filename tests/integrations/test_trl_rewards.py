"""TRL's own GRPOTrainer takes the rewards as they are: a tiny random model, two steps on a CPU."""

import pytest
from trl_cases import tiny_model_and_tokenizer

from r1kernels import rewards

trl = pytest.importorskip("trl")

@pytest.mark.filterwarnings("default")  # TRL's own
def test_trl_takes_the_rewards_as_they_are(tmp_path):
    import datasets

    model, tokenizer = tiny_model_and_tokenizer()
    rows = [{"prompt": "1 + 1 =", "answer": "2", "kind": "exact"}, {"prompt": "so", "answer": "", "kind": "open"}]
    seen = []

    def watched(completions, answer, **columns):
        seen.append((completions, answer))
        return [0.0] * len(completions)

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=32, num_generations=8,
        max_completion_length=2, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    trainer = trl.GRPOTrainer(
        model=model, processing_class=tokenizer, args=arguments, train_dataset=datasets.Dataset.from_list(rows * 8),
        reward_funcs=[rewards.accuracy, rewards.format, rewards.language, watched])
    trainer.train()
    logged = [line for line in trainer.state.log_history if "rewards/accuracy/mean" in line]
    assert len(logged) == len(seen) == 2
    totals = []
    for line, (completions, answers) in zip(logged, seen, strict=True):
        # TRL leaves out what cannot be scored: here the open answers.
        right = [float(text.endswith("<answer>2</answer>") and text.count("<answer>") == 1)
                 for text, answer in zip(completions, answers, strict=True) if answer]
        formed = [float(text.startswith("<think>") and text.endswith("</answer>")) for text in completions]
        assert line["rewards/accuracy/mean"] == pytest.approx(sum(right) / len(right))
        assert line["rewards/format/mean"] == pytest.approx(sum(formed) / len(formed))
        assert line["rewards/language/mean"] == 1.0
        totals.append((sum(right), sum(formed)))
    assert all(map(sum, zip(*totals, strict=True)))  # both rewards were given at times
