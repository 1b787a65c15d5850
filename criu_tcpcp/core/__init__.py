"""The ground floor: pure values and rules. No I/O, no clock, no logging; imports nothing of the floors above."""
