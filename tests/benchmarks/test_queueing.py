"""The queueing model against the closed forms that exist, its limits, and what must never get better with load."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.queueing import (
    Lane,
    Replica,
    at_rate,
    capacity,
    highest_rate,
    interpolated,
    linear_calls,
    on_gpu,
    poisson,
    simulate,
)

ENDLESS = 10**9  # places in the queue
COUNT = 5_000
LANE = Lane(linear_calls(0.010, 0.006, 7), decode=0.002, render=0.001, loop=0.002, travel=0.003)


def device_alone(calls, **others):
    """Nothing but a device."""
    return Replica((Lane(tuple(calls)),), **{"max_queue": ENDLESS, **others})


def long_run(replica, rate, shares=(1.0,)):
    """Mean latency over several seeds, and its standard error."""
    means = [at_rate(replica, rate, shares, count=COUNT, seed=seed).mean for seed in range(10)]
    return float(np.mean(means)), float(np.std(means, ddof=1) / math.sqrt(len(means)))


def agrees(found, exact):
    """Within four standard errors, which are small themselves."""
    mean, error = found
    assert error < 0.06 * exact
    return abs(mean - exact) < 4 * error


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("variation", [0.0, 0.5, 1.0])
def test_one_image_a_call_is_the_queue_of_pollaczek_and_khinchine(load, variation):
    exact = 1 + load * (1 + variation**2) / (2 * (1 - load))
    assert agrees(long_run(device_alone([1.0], variation=variation), load), exact)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_exponential_calls_of_any_size_are_baileys_queue(load):
    """M/M^[1,B]/1: while busy, n wait with a probability of w**n; the root of r (1 - w) = w (1 - w**B)."""
    most, rate = 4, 4 * load
    roots = np.roots([1.0, *[0.0] * (most - 1), -(rate + 1), rate])
    (w,) = (root.real for root in roots if abs(root.imag) < 1e-9 and 0 < root.real < 1 - 1e-9)
    busy_alone = 1 / (1 / rate + 1 / (1 - w))
    waiting = busy_alone * w / (1 - w) ** 2
    assert agrees(long_run(device_alone([1.0] * most, variation=1.0), rate), waiting / rate + 1)


def test_decoders_are_erlangs_queue():
    """M/M/3, by Erlang's C."""
    servers, offered = 3, 2.4
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    exact = 1 + last / (sum(terms) + last) / (servers - offered)
    replica = Replica((Lane((1e-9,), decode=1.0),), decoders=servers, max_queue=ENDLESS, variation=1.0)
    assert agrees(long_run(replica, offered), exact)


@pytest.mark.parametrize("variation", [0.0, 1.0])
def test_threads_that_share_a_core_are_processor_sharing(variation):
    """M/G/1-PS: E[S] / (1 - load), whatever the distribution."""
    replica = Replica(
        (Lane((1e-9,), decode=1.0),), cores=1, decoders=ENDLESS, max_queue=ENDLESS, variation=variation
    )  # fmt: skip
    assert agrees(long_run(replica, 0.6), 1 / 0.4)


@pytest.mark.parametrize("load", [0.7, 1.5])
def test_a_bounded_queue_refuses_what_the_formula_says(load):
    """M/M/1/K."""
    places = 5
    exact = (1 - load) * load**places / (1 - load ** (places + 1))
    replica = device_alone([1.0], variation=1.0, max_queue=places)
    refused = np.mean([at_rate(replica, load, count=COUNT, seed=seed).refused for seed in range(8)])
    assert refused == pytest.approx(exact, rel=0.06)


def test_a_lone_request_takes_the_sum_of_its_parts():
    found = at_rate(Replica((LANE,), cores=1), 0.001, count=200)
    assert found.p50 == pytest.approx(0.010 + 0.002 + 0.001 + 0.002 + 0.003)
    assert found.batch == 1


def test_full_the_replica_answers_its_capacity_in_full_batches():
    replica = Replica((LANE,), cores=1, max_queue=64)
    found = at_rate(replica, 3 * capacity(replica))
    # Refusing costs the loop its first half.
    most = (1 - (found.rate - found.answered) * LANE.loop / 2) * capacity(replica)
    assert found.answered == pytest.approx(most, rel=0.03)
    assert found.batch == pytest.approx(7, rel=0.03)
    assert found.admitted == pytest.approx(64, rel=0.05)


@pytest.mark.parametrize(
    ("replica", "most"),
    [
        (device_alone([2.0, 2.5, 6.0]), 2 / 2.5),
        (Replica((LANE,), cores=1), 1 / (0.046 / 7 + 0.005)),
        (Replica((LANE,), cores=1, device_on_cores=False), 7 / 0.046),
        (Replica((LANE,), cores=0.5, device_on_cores=False), 0.5 / 0.005),
        (Replica((Lane((0.001,), decode=0.1),), decoders=3), 30),
        (Replica((Lane((0.001,), loop=0.1),)), 10),
    ],
    ids=["batch", "core", "gpu", "gpu, half a core", "decoders", "loop"],
)
def test_the_capacity_is_that_of_the_narrowest_place(replica, most):
    assert capacity(replica) == pytest.approx(most)


@pytest.mark.parametrize("cores", [1, math.inf])
def test_below_its_capacity_the_queue_stays_and_above_it_grows(cores):
    replica = Replica((LANE,), cores=cores, max_queue=ENDLESS)
    below, above = (at_rate(replica, share * capacity(replica)) for share in (0.95, 1.05))
    assert below.admitted < 40
    assert above.admitted > 300


def test_the_capacity_is_a_bound_where_threads_compete_for_some_cores():
    """The device's thread is narrowest, yet has to share: the queue grows below what either alone would allow."""
    replica = Replica((LANE,), cores=2, max_queue=ENDLESS)
    assert at_rate(replica, 0.95 * capacity(replica)).admitted > 300
    assert at_rate(replica, 0.80 * capacity(replica)).admitted < 40


def test_two_lanes_share_the_core_and_their_work():
    maps = replace(LANE, calls=linear_calls(0.030, 0.020, 7))
    assert capacity(Replica((LANE, maps), cores=1), (0.8, 0.2)) == pytest.approx(
        1 / (0.8 * 0.046 / 7 + 0.2 * 0.150 / 7 + 0.005)
    )
    # A prediction does not wait for a map's call, it shares the core with it.
    both = simulate(Replica((Lane((1.0,)), Lane((0.1,))), cores=1), np.array([1.0, 1.5]), [0, 1])
    assert both.mean == pytest.approx((1.1 + 0.2) / 2)
    apart = simulate(Replica((Lane((1.0,)), Lane((0.1,))), cores=2), np.array([1.0, 1.5]), [0, 1])
    assert apart.mean == pytest.approx((1.0 + 0.1) / 2)
    assert apart.busy == pytest.approx(0.5 / 1.5)  # of the busier, until the last arrival


def test_load_makes_nothing_better():
    replica = Replica((LANE,), cores=1, max_queue=64)
    found = [at_rate(replica, share * capacity(replica), count=6000) for share in (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.5)]
    for less, more in pairwise(found):
        for name in ("mean", "p50", "p95", "p99", "batch", "waiting", "admitted", "busy", "refused"):
            assert getattr(less, name) <= getattr(more, name) * 1.001, name


def test_littles_law():
    found = at_rate(Replica((replace(LANE, travel=0.0, loop=0.0),), cores=1), 60)
    assert found.admitted == pytest.approx(found.rate * found.mean, rel=0.02)


def test_a_seed_is_a_run():
    replica = Replica((LANE,), cores=1, variation=0.3)
    assert at_rate(replica, 60, count=2000, seed=3) == at_rate(replica, 60, count=2000, seed=3)
    assert at_rate(replica, 60, count=2000, seed=3) != at_rate(replica, 60, count=2000, seed=4)


def test_given_arrivals_are_taken_as_they_are():
    """Three at once: one call for the first, which is there alone, and one for the two that came meanwhile."""
    found = simulate(device_alone([1.0, 1.5]), np.array([1.0, 1.0, 1.0, 9.0]))
    assert found.batch == pytest.approx(4 / 3)
    assert found.mean == pytest.approx((1.0 + 2.5 + 2.5 + 1.0) / 4)
    assert found.busy == pytest.approx(2.5 / 9)
    assert found.waiting == pytest.approx(2 * 1.0 / 9)


def test_poisson_arrivals_have_their_rate_and_are_as_random():
    gaps = np.diff(poisson(50.0, 100_000, seed=1))
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.02)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.02)


def test_the_highest_rate_keeps_the_target_and_no_more_would():
    replica = Replica((LANE,), cores=1, max_queue=ENDLESS)
    rate = highest_rate(replica, 0.100, count=2000)
    assert at_rate(replica, rate, count=2000).p99 <= 0.100
    assert at_rate(replica, 1.05 * rate, count=2000).p99 > 0.100
    assert highest_rate(replica, 0.017, count=2000) == 0  # a lone one takes 18 ms
    assert highest_rate(replica, 0.200, count=2000) > rate


def test_on_a_gpu_only_the_rest_is_the_cores():
    gpu = on_gpu(Replica((LANE,), cores=1), [linear_calls(0.005, 0.0005, 32)])
    assert capacity(gpu) == pytest.approx(1 / 0.005)
    assert at_rate(gpu, 100).p99 < at_rate(Replica((LANE,), cores=1), 80).p99


def test_calls_in_between_are_interpolated():
    assert interpolated({1: 1.0, 2: 3.0, 4: 4.0}, 4) == (1.0, 3.0, 3.5, 4.0)
    with pytest.raises(ValueError, match=r"Calls of \[1, 2\] images were measured; expected 1 and 4"):
        interpolated({1: 1.0, 2: 2.0}, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lane(()),
        lambda: Lane((0.0,)),
        lambda: Lane((1.0,), decode=-1.0),
        lambda: Replica(()),
        lambda: Replica((LANE,), cores=0),
        lambda: Replica((LANE,), decoders=0),
    ],
)
def test_impossible_figures_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_nothing_to_count_is_an_error():
    with pytest.raises(ValueError, match="at least one arrival"):
        simulate(device_alone([1.0]), np.array([]))
