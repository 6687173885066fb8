"""Rings that leave their host: what two_level and hybrid send by which links, and which of them a plan takes."""

import dataclasses
import re

import pytest

from ringjax.planning import communication
from ringjax.planning.communication import Sent
from ringjax.planning.devices import Target
from ringjax.planning.plan import plan_stage
from ringjax.planning.search import search
from ringjax.planning.traffic import Traffic
from ringjax.training.load import parse_config
from ringjax.training.yaml_tree import ConfigError

KV, SUMS = 100, 200
FAST, SLOW = 10.0, 1.0
LONG = """
{model: {size: 1b, vision_vocab_size: 0}, data: {}, training: {seq_len: %d, batch_size: 1},
 mesh: {shape: '1,1,1,-1', strategy: %s}}
"""


def two_level(hosts: int, near: int, parts: float, forwards: int = 1) -> Sent:
    sent = Traffic(rotations=hosts * near - 1, kv=KV, sums=SUMS)
    return communication._two_level(hosts, near, sent, FAST, SLOW, parts, forwards)


def plan(seq_len: int, strategy: str, target: str, **changes):
    config = parse_config(LONG % (seq_len, strategy), overrides=[(k, str(v)) for k, v in changes.items()])
    return plan_stage(config, config.stage_list[0], Target.parse(target))


def test_with_compute_for_everything_only_the_first_transfers_are_waited_for():
    """4 hosts of 8: backward K and V once across, and once inside in each of 4 turns."""
    assert two_level(4, 8, parts=1e9).exposed == pytest.approx(KV / SLOW + 4 * KV / FAST)


def test_with_no_compute_every_byte_is_waited_for():
    found = two_level(4, 8, parts=0.0)
    inside, across = 4 * 7, 3
    sent = inside * (KV + KV + SUMS) / FAST + across * (KV + KV + SUMS) / SLOW
    assert found.exposed == pytest.approx(sent + KV / SLOW + 4 * KV / FAST)
    assert found.hidden == 0


def test_a_transfer_across_has_the_compute_of_a_turn_to_hide_behind():
    """Forward: a hop of 32 takes parts / 32 seconds; the slow links need 100 s, a turn of 8 hops 96 and then 104 s."""
    hop = 12.0
    waits = two_level(4, 8, parts=32 * hop, forwards=2).exposed - two_level(4, 8, parts=32 * hop).exposed
    assert waits == pytest.approx(3 * (KV / SLOW - 8 * hop))
    hop = 13.0
    assert two_level(4, 8, 32 * hop, forwards=2).exposed == pytest.approx(two_level(4, 8, 32 * hop).exposed)


def test_one_device_a_host_is_the_plain_ring():
    ring = communication._ring(3, KV, SUMS, SLOW, 40.0, 1)
    found = two_level(4, 1, parts=40.0)
    assert (found.exposed, found.hidden) == pytest.approx((ring.exposed, ring.hidden))


def test_a_shard_eight_times_shorter_is_hidden_across_hosts_of_eight():
    ring, double = (plan(2**17, strategy, "h100:64").hop for strategy in ("ring", "two_level"))
    assert double.needed_tokens == pytest.approx(ring.needed_tokens / 8) and double.bytes == ring.bytes
    assert not ring.hidden and plan(2**19, "two_level", "h100:64").hop.hidden


def test_inside_one_host_two_level_costs_what_a_ring_does():
    ring, double = (plan(2**17, strategy, "h100:8").time.seconds for strategy in ("ring", "two_level"))
    assert ring == double


def test_on_two_slices_a_ring_is_two_level_where_it_must_cross():
    """One row of 2M tokens: copies of the model have no rows of their own, so the ring goes over both slices."""
    ring, double = (plan(2**21, strategy, "tpu:v5e:16x16:2") for strategy in ("ring", "two_level"))
    assert double.time.seconds < ring.time.seconds and double.hop.needed_tokens < ring.hop.needed_tokens
    assert double.hop.needed_tokens == pytest.approx(ring.hop.needed_tokens / 256)
    alone = plan(2**21, "two_level", "tpu:v5e:16x16")
    assert alone.time.seconds == plan(2**21, "ring", "tpu:v5e:16x16").time.seconds


def test_a_search_gives_each_slice_rows_of_its_own_where_there_are_enough():
    config = parse_config(LONG % (2**19, "ring"), overrides=[("training.batch_size", "2")])
    found = search(config, config.stage_list[0], Target.parse("tpu:v5e:8x8:2"))
    assert found.plan.sizes[0] * found.plan.sizes[1] == 2 and found.choice.near == found.plan.sizes[3]
    one = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=1))
    found = search(one, one.stage_list[0], Target.parse("tpu:v5e:8x8:2"))
    assert found.choice.strategy in ("two_level", "hybrid") and found.choice.near < found.plan.sizes[3]
    with pytest.raises(ConfigError, match="stage 'train': mesh 1,1,16,1 cannot be laid over 4 TPU slices"):
        plan(2**19, "ring", "tpu:v5e:2x2:4", **{"mesh.shape": "1,1,16,1"})


def test_hybrid_groups_as_training_will():
    """16 heads on hosts of 8: groups of 8, or of what host_size says."""
    config = parse_config(LONG % (2**17, "hybrid"))
    sizes, target = (1, 1, 1, 64), Target.parse("h100:64")
    assert communication.group(config.stage_list[0], sizes, target) == 8
    config = parse_config(LONG % (2**17, "hybrid"), overrides=[("mesh.host_size", "4")])
    assert communication.group(config.stage_list[0], sizes, target) == 4


@pytest.mark.parametrize("kv_heads, best", [(16, "hybrid"), (2, "two_level")])
def test_which_of_the_two_is_faster_depends_on_the_heads(kv_heads, best):
    """With a head for each device of a host, hybrid sends less inside it; with two, it sends copies of them across. The
    plain ring, whose every hop waits for one adapter of eight, is the slowest by far."""
    names = ("two_level", "hybrid", "ring")
    found = {name: plan(2**17, name, "h100:64", **{"model.kv_heads": kv_heads}).time.seconds for name in names}
    assert min(found, key=found.get) == best and max(found, key=found.get) == "ring"
    assert found[best] < 0.8 * found["ring"]


def test_a_search_says_what_the_hosts_are_worth():
    config = parse_config(LONG % (2**19, "ring"))
    stage, target = config.stage_list[0], Target.parse("h100:64")
    found = search(config, stage, target)
    chosen = found.choice.apply(stage, target).mesh
    assert found.plan.sizes[3] > 8 and (chosen.strategy, chosen.host_size) == ("two_level", 8)
    assert any(re.match(r"strategy two_level: .*ring takes \+\d{2,}", reason) for reason in found.reasons)


def test_slices_of_tpus_have_one_speed_of_links():
    config = parse_config(LONG % (2**19, "ring"))
    found = search(config, config.stage_list[0], Target.parse("tpu:v5p:4x4x4"))
    assert found.choice.strategy not in ("two_level", "hybrid")
