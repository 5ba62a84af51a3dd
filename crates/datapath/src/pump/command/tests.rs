use super::{Command, CommandQueue, Event, EventQueue};
use crate::pump::wait::sleep;

fn is_ready(fd: i32) -> bool {
    sleep([fd], Some(std::time::Duration::ZERO))[0]
}

#[test]
fn test_commands_come_out_in_order_and_announce_themselves() {
    let queue = CommandQueue::new().unwrap();
    assert!(queue.pop().is_none() && !is_ready(queue.wake_fd()));
    for token in 1..=3 {
        queue.push(token, Command::Stop { tx: token == 2 });
    }
    assert!(is_ready(queue.wake_fd()));
    queue.clear_wake();
    let tokens: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|(token, _)| token).collect();
    assert_eq!(tokens, [1, 2, 3]);
    assert!(!is_ready(queue.wake_fd()));
    queue.push(4, Command::Detach);
    assert!(matches!(queue.pop(), Some((4, Command::Detach))));
}

#[test]
fn test_events_are_announced_until_they_are_drained() {
    let queue = EventQueue::new().unwrap();
    assert!(queue.drain().is_empty() && !is_ready(queue.ready_fd()), "draining nothing does not block");
    for vring in 0..3 {
        queue.push(Event::KickedEmpty { vring });
    }
    assert!(is_ready(queue.ready_fd()));
    let vring = |event| match event {
        Event::KickedEmpty { vring } => vring,
        other => panic!("{other:?}"),
    };
    let vrings: Vec<_> = queue.drain().into_iter().map(vring).collect();
    assert_eq!(vrings, [0, 1, 2]);
    assert!(!is_ready(queue.ready_fd()));
}
