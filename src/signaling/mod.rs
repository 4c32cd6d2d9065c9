//! Agents, rooms, sessions, offers: the hub as a state machine.
