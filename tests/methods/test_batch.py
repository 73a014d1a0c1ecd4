"""What refine refuses before anything is computed; shapes and dtypes one by one are in test_methods."""

import pytest
import torch
from brute_force import make_layer
from torch import nn

from fastmeta import L2I, ExampleWeights, ImputeAndWeight, LabelGradientAlignment, MetaGradient
from fastmeta.derivatives import LabelGradient
from fastmeta.problem import WholeModelProblem
from fastmeta.problem.model_function import ModelFunction


@pytest.mark.parametrize("how", ["last_layer", "jvp"])
@pytest.mark.parametrize("name", ["unlabeled", "holdout", "labeled"])
def test_outputs_are_no_inputs_of_a_model(draw, how, name):
    layer, model, calls = make_layer(draw), nn.Linear(5, 4).double(), []
    model.register_forward_hook(lambda *_: calls.append(None))
    batch = {"unlabeled": layer.features_u, "holdout": layer.features_h, "targets": layer.classes}
    with pytest.raises(TypeError, match=f"{name} must be inputs of the model where model is given, got Outputs"):
        L2I(how=how).refine(**(batch | {name: layer.holdout}), model=model)
    assert not calls


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (lambda: L2I(), "strong"),
        (lambda: MetaGradient(), "labeled_logits"),
        (lambda: ExampleWeights(6), "labeled_logits"),
        (lambda: LabelGradientAlignment(6, 4), "strong"),
        (lambda: LabelGradientAlignment(6, 4), "pseudo_labels"),
    ],
)
def test_arguments_of_another_method_are_refused(draw, method, name):
    layer = make_layer(draw)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        method().refine(**layer.batch(), index=torch.arange(6), **{name: layer.unlabeled.logits})


def test_a_call_that_only_reads_needs_no_holdout(draw):
    layer = make_layer(draw)
    method = ExampleWeights(6, interval=2)
    refined = method.refine(unlabeled=layer.unlabeled, index=torch.arange(6))
    assert torch.equal(refined.weights, torch.ones(6, dtype=torch.float64))
    with pytest.raises(TypeError, match="holdout must be Outputs"):
        method.refine(unlabeled=layer.unlabeled, index=torch.arange(6))


def test_the_closed_form_is_not_of_a_whole_model(draw):
    layer, model = make_layer(draw), nn.Linear(5, 4).double()
    problem = WholeModelProblem(ModelFunction(model), layer.features_u, draw.probabilities(6, 4))
    with pytest.raises(ValueError, match="how='last_layer' needs a LastLayerProblem"):
        LabelGradient()(problem, {"weight": torch.zeros(4, 5, dtype=torch.float64)})


@pytest.mark.parametrize("how", ["jvp", "finite_difference", "forward_difference"])
def test_labels_of_a_whole_model_have_its_outputs(draw, how):
    layer, model = make_layer(draw), nn.Linear(5, 4).double()
    batch = {"unlabeled": layer.features_u, "holdout": layer.features_h, "targets": layer.classes}
    for columns in (1, 5):  # one column would broadcast
        for method in (L2I(how=how), ImputeAndWeight(6, how=how)):
            labels = torch.rand(6, columns, dtype=torch.float64).requires_grad_()
            with pytest.raises(ValueError, match=rf"\[6, {columns}\]"):
                method.refine(**batch, model=model, labels=labels, index=torch.arange(6))
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        L2I(how=how).refine(**batch, model=model, labels=[1.0])
