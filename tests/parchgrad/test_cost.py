"""The cost of a method: counted passes on a clock that the prediction itself moves."""

import pytest
import torch

from parchgrad.errors import OptionError
from parchgrad.evaluation.cost import FEW_ROUNDS, Cost, costs
from parchgrad.evaluation.methods import Method, all_methods
from parchgrad.explainer import Explainer
from tests.parchgrad.networks import batch, build, table_for


class Machine:
    """A predictor whose clock moves by one prediction's seconds at each."""

    device = torch.device("cpu")

    def __init__(self, seconds=1.0, slower=1.0):
        self.now, self.seconds, self.slower, self.predictions, self.asked = 0.0, seconds, slower, 0, []

    def clock(self):
        return self.now

    def predict(self, images):
        assert images.shape == (1, 3, 12, 12)
        self.predictions += 1
        self.now += self.seconds
        self.seconds *= self.slower
        return torch.zeros(1, 5)

    def method(self, name, passes, looks=True, extra=0.0):
        def maps(images, targets):
            self.asked.append(name)
            assert targets == [4]
            for _ in range(passes):
                self.predict(images)
            self.now += extra * self.seconds
            return torch.zeros(1, 12, 12)

        return Method(name, "gradient", "", maps, (lambda network: maps) if looks else None)

    def costs(self, *methods, **options):
        return costs(methods, self, batch(1)[0], 4, clock=self.clock, **options)


@pytest.mark.parametrize("seconds", [1.0, 0.001, 1e-9], ids=["large", "small", "tiny"])
def test_passes_are_counted(seconds):
    machine = Machine(seconds)
    found = machine.costs(*(machine.method(f"{n}", n) for n in (1, 2, 25)), machine.method("half", 3, extra=0.5))
    for name, passes in {"1": 1.0, "2": 2.0, "25": 25.0, "half": 3.5}.items():
        cost = found[name]
        assert (cost.passes, cost.low, cost.high) == pytest.approx((passes,) * 3)


def test_a_method_that_does_not_look_at_the_network_has_a_prediction_added():
    machine = Machine()
    found = machine.costs(machine.method("random map", 0, looks=False, extra=0.25), machine.method("one", 1))
    assert found["random map"].passes == pytest.approx(1.25)
    assert found["one"].passes == pytest.approx(1.0)


def test_rounds_are_interleaved_and_the_long_ones_few():
    machine = Machine()
    machine.costs(machine.method("short", 2), machine.method("long", 21), rounds=5)
    warm_up = ["short"] * 2 + ["long"] * 2
    assert machine.asked == warm_up + ["short", "short", "long"] * FEW_ROUNDS + ["short"] * 2 * (5 - FEW_ROUNDS)
    machine.asked.clear()
    machine.costs(machine.method("short", 2), machine.method("long", 21), rounds=1)
    assert machine.asked == [*warm_up, "short", "short", "long"]


def test_a_machine_that_slows_down_slows_both():
    """Each pass is a thousandth slower than the one before; four lie between the prediction and what is timed."""
    machine = Machine(slower=1.001)
    cost = machine.costs(machine.method("one", 4), rounds=9)["one"]
    assert cost.passes == pytest.approx(sum(1.001**n for n in range(5, 9)))


def test_median_and_quartiles_are_of_the_rounds():
    machine = Machine()
    rounds = [1.0, 9.0, 3.0, 2.0, 5.0]
    taken = iter([0.0, 0.0, *(time for one in rounds for time in (77.0, one))])  # warm-up; then two runs, one timed

    def maps(images, targets):
        machine.now += next(taken)
        return torch.zeros(1, 12, 12)

    method = Method("odd", "gradient", "", maps, lambda network: maps)
    assert machine.costs(method, rounds=5)["odd"] == Cost(3.0, 2.0, 5.0)


def test_a_short_prediction_is_timed_over_several_runs():
    machine = Machine(0.002)
    machine.costs(rounds=3)
    assert machine.predictions == 2 + 10 + 3 * (1 + 10)


def test_no_rounds_are_refused():
    machine = Machine()
    with pytest.raises(OptionError, match="rounds"):
        machine.costs(rounds=0)


def test_of_real_methods_on_the_processes_own_clock():
    model = build()
    explainer = Explainer(model, table_for(model, quantile=0.5))
    methods = all_methods(explainer, steps=2, samples=2)[0]
    found = costs(methods, explainer, batch(1)[0], 1, rounds=1)
    assert list(found) == [method.name for method in methods]
    assert all(cost.low == cost.passes == cost.high > 0 for cost in found.values())
    assert found["centre Gaussian"].passes > 1.0
