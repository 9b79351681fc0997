"""Each way's own claims, and that what a person can get wrong is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from merge.values import drawn, gap

from tarsia.core.errors import MergeError
from tarsia.merge import WAYS, Delta, Way
from tarsia.merge.align import ALIGN, core, knots
from tarsia.merge.combine import iso_c, iso_cts, polar, regmean, signs, ties, total, tsv, wudi
from tarsia.merge.sparsify import dare, magnitude, thresholds
from tarsia.merge.thin import spectrum
from tarsia.merge.ways import combined, find

SEED = st.integers(0, 1 << 16)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ones(count):
    return torch.ones(count, dtype=torch.float64)


class TestSparsify:
    @pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.99, 1.0])
    def test_so_many_of_the_largest_are_left(self, density):
        stack = noise(3, 7, 11)
        left = magnitude(stack, density)
        for before, after in zip(stack, left, strict=True):
            kept = after != 0
            assert int(kept.sum()) == int(density * 77)
            assert bool((after[kept] == before[kept]).all())
            assert before.abs()[~kept].max() <= before.abs()[kept].min() if density < 1 else True

    def test_among_equals_those_that_come_first_are_left(self):
        stack = torch.tensor([[2.0, -1.0, 1.0, 1.0, -1.0, 3.0]])
        assert magnitude(stack, 4 / 6).tolist() == [[2.0, -1.0, 1.0, 0.0, 0.0, 3.0]]
        assert magnitude(torch.ones(1, 8), 0.5).tolist() == [[1.0] * 4 + [0.0] * 4]

    def test_the_threshold_is_the_least_magnitude_that_is_left(self):
        stack = noise(2, 40)
        assert torch.equal(thresholds(stack, 0.25), stack.abs().sort(1, descending=True).values[:, 9])
        assert bool(thresholds(stack, 0.01).isinf().all())

    def test_what_is_dropped_at_random_is_made_up_for(self):
        stack = torch.ones(2, 200, 200, dtype=torch.float64)
        left = dare(stack, 0.3, [1, 2])
        assert set(left.unique().tolist()) == {0.0, 1 / 0.3}
        assert left.mean() == pytest.approx(1, abs=0.02) and not torch.equal(left[0], left[1])

    def test_a_mask_follows_from_its_seed_alone(self):
        stack = noise(3, 5, 6)
        one, other = dare(stack, 0.5, [4, 5, 6]), dare(stack.flip(0), 0.5, [6, 5, 4])
        assert torch.equal(one, other.flip(0)) and torch.equal(one, dare(stack, 0.5, [4, 5, 6]))


class TestFrames:
    @pytest.mark.parametrize("name", ALIGN)
    @pytest.mark.parametrize("ranks", [(2, 3), (1, 4, 2), (6, 7, 8), (0, 2), (3, 3)])
    def test_a_frame_loses_nothing(self, name, ranks):
        deltas = drawn(len(ranks), ranks)
        frame = ALIGN[name](deltas)
        for delta, part in zip(deltas, frame.parts, strict=True):
            assert gap(frame.back(part).weight(), delta.weight()) < 1e-12

    def test_the_bases_of_a_core_are_orthonormal_and_no_larger_than_needed(self):
        frame = core(drawn(0, (2, 3, 1)))
        assert frame.parts.shape == (3, 6, 6)
        assert gap(frame.left.T @ frame.left, torch.eye(6, dtype=torch.float64)) < 1e-12
        assert gap(frame.right @ frame.right.T, torch.eye(6, dtype=torch.float64)) < 1e-12
        assert core(drawn(0, (8, 8))).parts.shape == (2, 12, 9)

    def test_knots_has_one_left_basis_and_the_singular_values_in_the_parts(self):
        deltas = drawn(0, (2, 3))
        frame, wide = knots(deltas), torch.cat([delta.weight() for delta in deltas], 1)
        values = torch.linalg.svdvals(wide)[:5]
        assert gap(torch.cat(list(frame.parts), 1).norm(dim=1), values) < 1e-10

    @pytest.mark.parametrize("name", ALIGN)
    def test_how_factors_are_spelt_does_not_matter(self, name):
        plain, turn = drawn(3, (3, 2)), noise(3, 3, seed=9)
        other = [Delta(up=plain[0].up @ turn, down=torch.linalg.solve(turn, plain[0].down)), plain[1]]
        way = WAYS[f"{name}_ties"]
        assert gap(combined(way, other, [1, 1], "p").weight(), combined(way, plain, [1, 1], "p").weight()) < 1e-8

    def test_a_core_that_leaves_a_direction_out_is_seen(self, monkeypatch):
        import tarsia.merge.align as align

        monkeypatch.setattr(align, "NOTHING", 0.2)
        deltas = drawn(0, (4, 4))
        frame = core(deltas)
        assert max(gap(frame.back(p).weight(), d.weight()) for p, d in zip(frame.parts, deltas, strict=True)) > 1e-3


class TestRefactoring:
    def test_the_error_is_that_of_what_is_left_out(self):
        delta = drawn(1, (6,))[0]
        for rank in (1, 3, 5, 6):
            found = spectrum(delta, rank)
            a, b = found.factors(rank)
            assert len(a) == rank
            wanted = float((b @ a - delta.weight()).norm() / delta.weight().norm())
            error = found.off(rank)
            assert error == pytest.approx(wanted, abs=1e-9) and (error > 1e-3) == (rank < 6)

    def test_no_matrix_of_that_rank_is_nearer(self):
        delta = drawn(1, (0,))[0]
        a, b = spectrum(delta, 3).factors(3)
        left, values, right = torch.linalg.svd(delta.weight())
        assert gap(b @ a, (left[:, :3] * values[:3]) @ right[:3]) < 1e-10


class TestTies:
    def test_a_number_is_the_mean_of_those_with_the_elected_sign(self):
        parts = torch.tensor([[3.0, -1.0, 0.0, -2.0], [1.0, -2.0, 5.0, 1.0], [-2.0, 1.0, 0.0, 1.0]])
        assert ties(parts, ones(3)).tolist() == [2.0, -1.5, 5.0, 1.0]
        assert signs(parts).tolist() == [1, -1, 1, 1]
        assert signs(torch.tensor([[-5.0], [1.0], [1.0]]), "frequency").tolist() == [1]
        assert signs(torch.tensor([[-5.0], [1.0], [1.0]]), "total").tolist() == [-1]

    def test_an_even_vote_is_positive(self):
        assert ties(torch.tensor([[1.0], [-1.0]]), ones(2)).tolist() == [1.0]

    def test_weights_before_or_after_the_election(self):
        parts, weights = torch.tensor([[1.0], [-2.0]]), torch.tensor([4.0, 1.0])
        assert ties(parts, weights).tolist() == [-2.0]
        assert ties(parts, weights, weigh="before", normalise="weights").tolist() == [1.0]
        assert ties(parts, weights, weigh="before", normalise="none").tolist() == [4.0]


class TestIso:
    def test_the_spectrum_is_flat_at_the_mean(self):
        parts = noise(3, 6, 8)
        values = torch.linalg.svdvals(iso_c(parts, ones(3)))
        assert gap(values, torch.linalg.svdvals(parts.sum(0)).mean().expand(6)) < 1e-12

    def test_directions_are_the_sums_own(self):
        deltas = drawn(2, (2, 2))
        found, plain = (combined(WAYS[n], deltas, [1, 1], "p").weight() for n in ("iso_c", "task_arithmetic"))
        values = torch.linalg.svdvals(plain)[:4]
        assert gap(torch.linalg.svdvals(found)[:4], values.mean().expand(4)) < 1e-12
        assert float(torch.linalg.svdvals(found)[4]) < 1e-12
        left, _, right = torch.linalg.svd(plain)
        assert gap(left[:, :4].T @ found @ right[:4].T, values.mean() * torch.eye(4, dtype=torch.float64)) < 1e-10

    def test_all_in_common_is_iso_c(self):
        parts = noise(2, 6, 6)
        assert gap(iso_cts(parts, ones(2), common=1.0), iso_c(parts, ones(2))) < 1e-12

    def test_with_directions_of_each_task_the_spectrum_is_flat_too(self):
        found = iso_cts(noise(2, 6, 7), ones(2), common=0.5)
        values = torch.linalg.svdvals(found)
        assert gap(values, values.mean().expand(6)) < 1e-10
        assert gap(found, iso_c(noise(2, 6, 7), ones(2))) > 1e-2

    def test_against_the_algorithm_step_by_step(self):
        """Two tasks of 8 x 8, half in common: 4 common directions and 2 of each task outside of them."""
        parts = noise(2, 8, 8)
        u, s, v = torch.linalg.svd(parts.sum(0))
        lefts, values, rights = [u[:, :4]], [s[:4]], [v[:4]]
        for part in parts:
            own, size, other = torch.linalg.svd((torch.eye(8).double() - u[:, :4] @ u[:, :4].T) @ part)
            lefts, values, rights = [*lefts, own[:, :2]], [*values, size[:2]], [*rights, other[:2]]
        (a, _, b), (c, _, d) = (torch.linalg.svd(t) for t in (torch.cat(lefts, 1), torch.cat(rights)))
        wanted = torch.cat(values).mean() * (a @ b) @ (c @ d)
        assert gap(iso_cts(parts, ones(2), common=0.5), wanted) < 1e-10

    @given(
        count=st.integers(2, 5), rows=st.integers(1, 7), columns=st.integers(1, 7), common=st.floats(0.01, 1), seed=SEED
    )
    @example(count=3, rows=2, columns=5, common=0.3, seed=0)
    def test_no_more_directions_are_told_apart_than_there_are(self, count, rows, columns, common, seed):
        """Of s directions, however many tasks share them: each the same number, and at least the rest in common."""
        parts = noise(count, rows, columns, seed=seed)
        small = min(rows, columns)
        found = iso_cts(parts, ones(count), common=common)
        each = min(round((small - int(small * common)) / count), small // count)
        values = torch.linalg.svdvals(found)
        assert gap(values, values[0].expand(small)) < 1e-8
        u, s, _ = torch.linalg.svd(parts.sum(0), full_matrices=False)
        shared = small - count * each
        assert shared >= 0
        apart = [part - u[:, :shared] @ u[:, :shared].T @ part for part in parts]
        sizes = torch.cat([s[:shared], *(torch.linalg.svdvals(part)[:each] for part in apart)])
        assert abs(float(values[0]) - float(sizes.mean())) < 1e-8
        if each == 0:
            assert gap(found, iso_c(parts, ones(count))) < 1e-8


class TestTsv:
    def test_against_the_algorithm_step_by_step(self):
        """Two tasks of 8 x 8: 4 directions of each, made orthogonal by the polar factors."""
        lefts, values, rights = zip(*(torch.linalg.svd(part) for part in noise(2, 8, 8)), strict=True)
        (a, _, b), (c, _, d) = (
            torch.linalg.svd(t) for t in (torch.cat([u[:, :4] for u in lefts], 1), torch.cat([v[:4] for v in rights]))
        )
        wanted = (a @ b) @ torch.diag(torch.cat([s[:4] for s in values])) @ (c @ d)
        assert gap(tsv(noise(2, 8, 8), ones(2)), wanted) < 1e-10

    def test_what_does_not_overlap_is_left_alone(self):
        parts = torch.zeros(2, 6, 6, dtype=torch.float64)
        parts[0, :3, :3], parts[1, 3:, 3:] = noise(3, 3), noise(3, 3, seed=1)
        assert gap(tsv(parts, ones(2)), parts.sum(0)) < 1e-12

    def test_overlapping_directions_are_made_orthogonal(self):
        up = polar(noise(8, 2))
        parts = torch.stack([up @ noise(2, 8, seed=i) for i in (1, 2)])
        assert len([v for v in torch.linalg.svdvals(tsv(parts, ones(2))) if v > 1e-9]) <= 4


class TestWudi:
    def test_it_is_the_minimum_of_the_papers_objective(self):
        parts = noise(3, 5, 6)

        def objective(tau):
            units = [part / part.norm() for part in parts]
            return float(sum(((tau - part) @ unit.T).square().sum() for part, unit in zip(parts, units, strict=True)))

        found = wudi(parts, ones(3), ridge=0.0)
        best = objective(found)
        assert best < 0.9 * objective(parts.sum(0))
        for seed in range(8):
            assert objective(found + 1e-3 * noise(5, 6, seed=seed + 50)) > best

    def test_descent_from_the_sum_arrives_there(self):
        parts = noise(3, 4, 5)
        tau = parts.sum(0).clone().requires_grad_()
        units = parts / parts.flatten(1).norm(dim=1)[:, None, None]
        optimiser = torch.optim.LBFGS([tau], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure():
            optimiser.zero_grad()
            loss = ((tau - parts) @ units.mT).square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        assert gap(tau.detach(), wudi(parts, ones(3), ridge=0.0)) < 1e-5

    @pytest.mark.parametrize("sides", ["input", "output", "both"])
    def test_between_the_minimum_and_the_sum_lies_the_ridge(self, sides):
        parts = noise(3, 5, 6)
        plain = parts.sum(0)
        gaps = [gap(wudi(parts, ones(3), ridge=ridge, sides=sides), plain) for ridge in (0.0, 0.1, 1.0, 1e6)]
        assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0.1 and gaps[-1] < 1e-5

    def test_both_sides_are_the_minimum_of_both_objectives(self):
        parts = noise(2, 4, 5)
        tau = wudi(parts, ones(2), ridge=0.0, sides="both").requires_grad_()
        units = parts / parts.flatten(1).norm(dim=1)[:, None, None]
        loss = ((tau - parts) @ units.mT).square().sum() + (units.mT @ (tau - parts)).square().sum()
        (slope,) = torch.autograd.grad(loss, tau)
        assert float(slope.abs().max()) < 1e-10

    @pytest.mark.parametrize("sides", ["input", "output", "both"])
    def test_tasks_that_share_no_direction_are_summed(self, sides):
        parts = torch.zeros(2, 6, 6, dtype=torch.float64)
        parts[0, :3, :3], parts[1, 3:, 3:] = noise(3, 3), noise(3, 3, seed=1)
        assert gap(wudi(parts, ones(2), ridge=0.0, sides=sides), parts.sum(0)) < 1e-10


class TestRegMean:
    @pytest.mark.parametrize("samples", [3, 40])
    @pytest.mark.parametrize("ridge", [0.0, 1e-14, 1e-6, 0.1, 10.0])
    def test_it_is_the_least_squares_solution(self, samples, ridge):
        """Against the normal equations, with fewer samples than inputs and with more."""
        parts, weights, seen = noise(2, 5, 7), torch.tensor([1.0, -0.5]).double(), list(noise(2, samples, 7, seed=1))
        moments = [x.T @ x / samples for x in seen]
        pull = ridge * float(sum(moments).diagonal().mean())
        goal = sum(w * part @ moment for w, part, moment in zip(weights, parts, moments, strict=True))
        start = 0.3 * (weights[:, None, None] * parts).sum(0)
        whole = sum(moments) + pull * torch.eye(7).double()
        wanted = start + (goal - start @ sum(moments)) @ torch.linalg.pinv(whole, hermitian=True, rtol=1e-10)
        found = regmean(parts, weights, inputs=seen, ridge=ridge, toward=0.3)
        assert gap(found, wanted) < 1e-6 and (ridge > 1 or gap(found, parts.sum(0)) > 0.1)


class TestTable:
    def test_an_inner_sum_in_any_frame_is_task_arithmetic(self):
        deltas, weights = drawn(5, (2, 4, 3)), [1.0, -0.5, 2.0]
        plain = total(torch.stack([d.weight() for d in deltas]), torch.tensor(weights, dtype=torch.float64))
        for align in (*ALIGN, "none"):
            assert gap(combined(Way("sum", align=align), deltas, weights, "p").weight(), plain) < 1e-12

    def test_a_mean_is_weighed_by_the_weights(self):
        deltas = [Delta(d.up, d.down, bias=noise(12, seed=i)) for i, d in enumerate(drawn(5, (2, 4)))]
        made = combined(WAYS["linear"], deltas, [1.0, 3.0], "p")
        assert gap(made.weight(), (deltas[0].weight() + 3 * deltas[1].weight()) / 4) < 1e-12
        assert gap(made.bias, (deltas[0].bias + 3 * deltas[1].bias) / 4) < 1e-12

    def test_every_way_has_a_source_and_runs(self):
        for way in WAYS.values():
            assert way.source
            made = combined(way, drawn(1, (2, 3, 2)), [1, 1, 1], "p").weight()
            assert made.shape == (12, 9) and bool(made.isfinite().all()) and float(made.norm()) > 0

    @pytest.mark.parametrize("way", WAYS)
    def test_in_a_frame_the_result_stays_factored(self, way):
        made = combined(WAYS[way], drawn(1, (2, 3)), [1, 1], "p")
        dense = WAYS[way].sparsify != "none" and WAYS[way].align == "none"
        assert made.factored != dense

    def test_a_name_that_is_none_names_the_nearest(self):
        with pytest.raises(MergeError, match="did you mean knots_ties") as refusal:
            find("knot_ties")
        assert "task_arithmetic" in str(refusal.value)

    @pytest.mark.parametrize(
        "options, said",
        [
            ({"density": 0.0}, "above 0"),
            ({"density": 1.5}, "at most 1"),
            ({"density": True}, "share"),
            ({"dense": 0.5}, "did you mean density"),
            ({"elect": "loudest"}, "total, frequency"),
            ({"seed": 3}, "no option 'seed'"),
        ],
    )
    def test_options_that_are_none_are_refused(self, options, said):
        with pytest.raises(MergeError, match=said):
            WAYS["ties"].taking(options)

    @pytest.mark.parametrize(
        "options", [{"ridge": -1}, {"sides": "left"}, {"ridge": float("nan")}, {"ridge": float("inf")}]
    )
    def test_so_are_values_of_wudi(self, options):
        with pytest.raises(MergeError):
            WAYS["wudi"].taking(options)

    def test_an_axis_that_is_none_is_refused(self):
        with pytest.raises(MergeError, match="no such combine"):
            Way("mine", combine="median")

    @pytest.mark.parametrize("weights", [[-1.0, 1.0], [-2.0, 1.0], [-1.0, 3.0]])
    def test_shares_of_a_mean_are_none_where_a_weight_is_below_0(self, weights):
        with pytest.raises(MergeError, match="task_arithmetic"):
            WAYS["linear"].shares(weights)
        assert WAYS["cat"].shares(weights) == weights

    def test_weights_below_nothing_are_refused_where_they_mean_nothing(self):
        for name in ("linear", "ties", "knots_ties", "dare_ties"):
            with pytest.raises(MergeError, match=r"below 0|vote for itself"):
                combined(WAYS[name], drawn(0, (2, 2)), [1.0, -1.0], "p")
        combined(WAYS["ties"].taking({"weigh": "before"}), drawn(0, (2, 2)), [1.0, -1.0], "p")
        combined(WAYS["wudi"], drawn(0, (2, 2)), [1.0, -1.0], "p")
