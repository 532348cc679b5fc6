# SPDX-License-Identifier: Apache-2.0
"""torch.library.opcheck on every op: schema, autograd registration, fake tensors, AOT dispatch."""

import pytest
import samples
import torch

WITH_GRADIENT = [x for x in samples.FORMS if x.startswith(("attn_pool", "pool_gate", "gate_sc"))]


@pytest.mark.parametrize(
    "form, grad", [(x, False) for x in samples.FORMS] + [(x, True) for x in WITH_GRADIENT]
)
def test_opcheck(device, form, grad, seed):
    op, args, kwargs = samples.sample(form, device, grad=grad, seed=seed)
    torch.library.opcheck(op.default, args, kwargs)


@pytest.mark.parametrize("form", samples.FORMS)
def test_fake_tensors_match(device, form, seed):
    """Shapes, dtypes, strides and devices of the fake results are those of the real ones."""
    op, args, kwargs = samples.sample(form, device, seed=seed)
    real = samples.as_tuple(op(*args, **kwargs))
    with torch._subclasses.FakeTensorMode() as mode:
        fake_args, fake_kwargs = torch.utils._pytree.tree_map_only(
            torch.Tensor, mode.from_tensor, (args, kwargs)
        )
        fake = samples.as_tuple(op(*fake_args, **fake_kwargs))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


@pytest.mark.parametrize("form", samples.FORMS)
def test_meta_tensors(form):
    """Shape inference needs neither data nor a device."""
    op, args, kwargs = samples.sample(form)
    real = samples.as_tuple(op(*args, **kwargs))
    args, kwargs = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: x.to("meta"), (args, kwargs)
    )
    for a, b in zip(real, samples.as_tuple(op(*args, **kwargs)), strict=True):
        assert b.device.type == "meta" and (a.shape, a.dtype) == (b.shape, b.dtype)


def test_inputs_are_not_written(device, seed):
    for form in samples.FORMS:
        op, args, kwargs = samples.sample(form, device, seed=seed)
        before = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        op(*args, **kwargs)
        for a, b in zip(
            torch.utils._pytree.tree_leaves(before),
            torch.utils._pytree.tree_leaves((args, kwargs)),
            strict=True,
        ):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_outputs_do_not_alias_inputs(device, seed):
    for form in samples.FORMS:
        op, args, kwargs = samples.sample(form, device, seed=seed)
        inside = {
            x.untyped_storage().data_ptr()
            for x in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for x in samples.as_tuple(op(*args, **kwargs)):
            assert x.untyped_storage().data_ptr() not in inside
