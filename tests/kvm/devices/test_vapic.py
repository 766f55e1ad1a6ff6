from __future__ import annotations

from kvm.devices.vapic import Vapic
from qemumig.savevm.devices.kvm_tpr_opt import KVM_TPR_OPT, KvmTprOptState
from qemumig.savevm.reader import BytesReader


def test_a_fresh_helper_is_all_zeroes() -> None:
    assert KVM_TPR_OPT.save(Vapic().save())[0] == bytes(144)


def test_state_of_a_patched_guest_is_kept_for_the_next_migration_and_lost_in_a_reset() -> None:
    wire = bytes(8) + bytes(range(136))
    vapic = Vapic()
    vapic.load(KVM_TPR_OPT.load(BytesReader(wire), 1))
    assert KVM_TPR_OPT.save(vapic.save())[0] == wire
    vapic.reset()
    assert vapic.save() == KvmTprOptState()
