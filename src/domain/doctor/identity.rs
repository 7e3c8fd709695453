//! Two machines with one identity.

use super::{Finding, words};
use crate::domain::network::Facts;

pub(super) fn examine(facts: &Facts) -> Vec<Finding> {
    if facts.same_identity.is_empty() {
        return Vec::new();
    }
    let at = words::list(&facts.same_identity.iter().map(|address| words::quoted(address)).collect::<Vec<_>>());
    if !facts.same_identity_certain {
        // One member may err or lie, and a key that was removed is gone for good.
        return vec![
            Finding::warning(
                "duplicate-identity",
                format!("one member says that another machine, at {at}, uses the identity of this node ({})", facts.id),
            )
            .mend("if a machine of yours is there, compare the ids before anything else; on both: ogctl status"),
        ];
    }
    vec![
        Finding::error(
            "duplicate-identity",
            format!(
                "another machine uses the identity of this node ({}), at {at}; the others can talk to one of the two only",
                facts.id
            ),
        )
        .mend(
            "on the machine that was copied: sudo systemctl stop opengatewayd && sudo rm /var/lib/opengateway/identity.key \
             /var/lib/opengateway/identity.pub && sudo systemctl start opengatewayd",
        ),
    ]
}
