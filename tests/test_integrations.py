"""The callbacks inside the real training loops of Lightning and transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from initaudit.errors import UsageError
from initaudit.integrations.gate import Gate, NotTrainable, UntrainableWarning, inputs_of

pytestmark = pytest.mark.filterwarnings("ignore", "error::initaudit.integrations.gate.UntrainableWarning")


def layers(activation, depth, width=16):
    torch.manual_seed(0)
    stack = [layer for _ in range(depth) for layer in (nn.Linear(width, width), activation())]
    model = nn.Sequential(*stack, nn.Linear(width, 2))
    if activation is nn.ReLU:
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
    return model


def lightning_fit(model, *callbacks, steps=3, checkpoint=None):
    lightning = pytest.importorskip("pytorch_lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(model)
            self.steps = 0

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            self.steps += 1
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(1)
    data = TensorDataset(torch.randn(64, 16), torch.randint(0, 2, (64,)))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", callbacks=list(callbacks), **quiet)
    module = Lit()
    try:
        trainer.fit(module, DataLoader(data, batch_size=16, shuffle=True), ckpt_path=checkpoint)
    finally:
        trainer.module = module
    return trainer


def lightning_callback(*arguments, **options):
    pytest.importorskip("pytorch_lightning")
    from initaudit.integrations.lightning import InitauditCallback

    return InitauditCallback(*arguments, **options)


def test_lightning_trains_a_healthy_module_as_if_nothing_had_been():
    model = layers(nn.ReLU, 3)
    plain, audited = lightning_fit(model), lightning_fit(model, lightning_callback())
    assert audited.global_step == 3
    for a, b in zip(plain.module.parameters(), audited.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lightning_stops_before_the_first_step():
    model = layers(nn.Sigmoid, 20)
    with pytest.raises(NotTrainable, match="Lit is not fit for training: 1 error"):
        lightning_fit(model, lightning_callback())
    with pytest.warns(UntrainableWarning, match="not fit for training"):
        assert lightning_fit(model, lightning_callback("warn")).global_step == 3


def test_lightning_does_not_audit_what_goes_on_from_a_checkpoint(tmp_path):
    model = layers(nn.Sigmoid, 20)
    trainer = lightning_fit(model)
    trainer.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    assert lightning_fit(model, lightning_callback(), steps=5, checkpoint=tmp_path / "half.ckpt").global_step == 5


def test_lightning_takes_the_inputs_that_it_is_given():
    seen = []
    callback = lightning_callback(inputs=lambda batch: seen.append(batch) or batch[0])
    lightning_fit(layers(nn.ReLU, 2), callback, steps=2)
    assert [tuple(tensor.shape) for tensor in seen[0]] == [(16, 16), (16,)]


def trainer_of(model, data, folder, *callbacks, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(output_dir=str(folder), save_strategy="no", **settings, **options)
    return transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=list(callbacks))


def tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 100, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes))


class Tokens(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(0, 100, (16, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        torch.rand(1)  # as an augmentation would: the audit must not shift what training draws
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def hf_callback(*arguments, **options):
    pytest.importorskip("transformers")
    from initaudit.integrations.transformers import InitauditCallback

    return InitauditCallback(*arguments, **options)


def test_transformers_trains_a_healthy_model_as_if_nothing_had_been(tmp_path):
    plain = trainer_of(tiny_gpt2(), Tokens(), tmp_path)
    plain.train()
    audited = trainer_of(tiny_gpt2(), Tokens(), tmp_path, hf_callback())
    audited.train()
    assert audited.state.global_step == 2
    for a, b in zip(plain.model.parameters(), audited.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_transformers_stops_before_the_first_step(tmp_path):
    model = tiny_gpt2()
    for block in model.transformer.h:
        block.mlp.c_fc.weight.data.zero_()
        block.mlp.c_proj.weight.data.zero_()
    trainer = trainer_of(model, Tokens(), tmp_path, hf_callback())
    with pytest.raises(NotTrainable, match="GPT2LMHeadModel is not fit for training"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.warns(UntrainableWarning):
        trainer_of(model, Tokens(), tmp_path, hf_callback("warn")).train()


class Stream(torch.utils.data.IterableDataset):
    def __init__(self):
        self.read = 0

    def __iter__(self):
        data = Tokens()
        for index in range(16):
            self.read += 1
            yield data[index]


def test_a_stream_is_not_read_ahead(tmp_path):
    stream = Stream()
    seen = []

    class Watch(hf_callback().__class__.__mro__[1]):
        def on_step_begin(self, *_, **__):
            seen.append(stream.read)

    trainer = trainer_of(tiny_gpt2(), stream, tmp_path, hf_callback(), Watch())
    trainer.train()
    assert seen[0] <= 8


@pytest.mark.parametrize(
    ("batch", "forward", "taken"),
    [
        ((1, 2), lambda x: x, (1,)),
        ([1, 2, 3], lambda x, mask: x, (1, 2)),
        ((1, 2), lambda x, mask=None: x, (1,)),
        ({"x": 1, "y": 2}, lambda x: x, {"x": 1}),
        ({"y": 2}, lambda x: x, None),
        (7, lambda x: x, 7),
    ],
)
def test_the_part_of_a_batch_that_forward_takes(batch, forward, taken):
    assert inputs_of(batch, forward) == taken


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="'fail' or 'warn'"):
        Gate("stop", None, None)
    gate = Gate("fail", {"fail_one": "error"}, None)
    with pytest.raises(UsageError, match="did you mean 'fail_on'"):
        gate.complaint(layers(nn.ReLU, 1), torch.randn(4, 16), nn.Identity.forward)


def test_what_cannot_be_traced_is_a_warning_and_no_stop():
    class Stubborn(nn.Linear):
        def forward(self, x):
            raise RuntimeError("not today")

    module = Stubborn(4, 4)
    with pytest.warns(UntrainableWarning, match="could not probe the model"):
        assert Gate("fail", None, None).complaint(module, torch.randn(2, 4), module.forward) == ""
