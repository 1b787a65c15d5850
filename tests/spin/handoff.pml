/* The handoff as a model for SPIN. The tables are the project's own (tables.pml, made by promela.py); here is what their
 * actions do, what happens around them, and what must never be.
 *
 * One step is one action of one side, or one fault. At the origin there is the keeper, or a resolve after it; at the
 * destination up to two serves, each with its own session (slot): the one that stages, and the later ones that are
 * asked. Faults, each with a budget: either side's process is killed, a message is lost, two messages of a session
 * change places, a side waits no longer though something is coming. When nothing else can happen, a side that waits is
 * told that its time is over, and where the origin's journal says that the pass is unsettled and nobody works on it,
 * resolve runs.
 *
 * Left out, and left to the simulation: reboots, full disks, programs that die, refusals by the kernel, --force-origin,
 * two resolves at once, release. A new serve sweeps in the step that makes it.
 */

#ifndef CRASHES
#define CRASHES 2
#endif
#ifndef LOSSES
#define LOSSES 3
#endif
#ifndef REORDERS
#define REORDERS 1
#endif
#ifndef IMPATIENCE
#define IMPATIENCE 1
#endif
#define PATIENCE 2
#define RESOLVES 12

/* -DONE_OWNER_ONLY: nothing else is required. */
#ifdef ONE_OWNER_ONLY
#define REQUIRE(what) skip
#else
#define REQUIRE(what) assert(what)
#endif

/* scratch: not part of a state */
hidden int next;
hidden byte failed;
hidden byte happened;
hidden byte message;

/* the origin's process: none, keeper, resolve */
#define KEEPER 1
#define RESOLVE 2
byte o_process = KEEPER;
byte o_state;
byte o_pc;
byte o_act;
byte o_link = 1;                /* slot + 1 */
byte asked;
byte resolves;
bit cancels = 1;

/* the origin host */
#define NOTHING 0
#define CLAIMED 1
#define OFFERED 2
#define LET_GO 3
#define COMMITTED 4
#define DONE 5
#define LOST 6
byte journal = CLAIMED;         /* its last record; what an undone pass says is nothing */
#define UNSETTLED (journal == OFFERED || journal == LET_GO || journal == COMMITTED)
bit saved;
bit endpoint = 1;
bit traced;
bit pinned;
bit fenced;
bit silent;
bit dirty;                      /* the program ran on since the state was read */
#define O_SPEAKS (endpoint && !fenced && !silent)
#define O_RUNS (!traced && !pinned)

/* the destination's serves */
#define GONE 0
#define LISTENS 1
#define RUNS 2
#define WAITS_FOR_LOCK 3
byte s_process[2];
byte s_state[2];
byte s_pc[2];
byte s_act[2];
bit s_asked[2];                 /* it was asked about the pass (Destination.recovered) */
bit s_has[2];                   /* it has the socket */
bit s_delivered[2];
bit o_hung_up[2];

/* the destination host */
#define ABORTED 2
bit directory = 1;
byte verdict;                   /* 0, 1 committed, 2 aborted */
bit written_active;
bit written_lost;
byte lock = 1;                  /* slot + 1 */
byte sock;                      /* 0, 1 dormant, 2 alive */
byte sock_of;                   /* the serve that has it, slot + 1 */
byte told_by;                   /* the serve that the program has it from */
bit in_program;
bit delivered;
bit d_fence = 1;
#define D_SPEAKS (sock == 2 && !d_fence)

/* history */
bit ever_committed;
bit lived;
bit lived_and_ended;

/* faults */
byte o_crashes;
byte d_crashes;
byte losses;
byte reorders;
byte impatience;

#define SETTLED 250
chan to_o[2] = [3] of { byte };
chan to_d[2] = [3] of { byte };

#include "tables.pml"

inline origin_load()
{
    o_act = ORIGIN_ACTION(o_pc)
}

inline serve_load(i)
{
    s_act[i] = DESTINATION_ACTION(s_pc[i])
}

inline check()
{
    assert(!(O_SPEAKS && D_SPEAKS));            /* never two owners */
    if
    :: D_SPEAKS -> lived = 1
    :: else
    fi
}

inline running()                /* the origin's program is not stopped any more */
{
    if
    :: O_RUNS && endpoint -> dirty = 1
    :: else
    fi
}

inline hang_up()
{
    if
    :: o_link > 0 -> o_hung_up[o_link - 1] = 1; o_link = 0
    :: else
    fi
}

/* The origin's process ends: what was its own goes with it. */
inline origin_ends()
{
    hang_up();
    o_process = 0;
    o_pc = 0;
    o_act = 0;
    silent = 0;
    asked = 0;
    if
    :: traced -> traced = 0; running()
    :: else
    fi;
    if
    :: !UNSETTLED && journal < DONE -> journal = NOTHING; saved = 0      /* the command removes it, or the keeper */
    :: else
    fi
}

inline origin_event(ev)
{
    next = ORIGIN_TRANSITION(o_state, ev);
    next = (next > 0 -> next : ORIGIN_TRANSITION(o_state, E_LINK_LOST));
    assert(next > 0);                           /* as the executor does with an event that the table does not know */
    o_state = next / 256;
    o_pc = next % 256;
    origin_load();
    if
    :: o_act == 0 && O_FINAL(o_state) ->
        if
        :: o_state == O_ROLLED_BACK -> journal = NOTHING; saved = 0
        :: else
        fi;
        o_state = 0;
        origin_ends()
    :: else
    fi
}

inline to_destination(what)
{
    failed = o_link == 0 || s_process[o_link - 1] == GONE || full(to_d[o_link - 1]);
    if
    :: !failed -> to_d[o_link - 1]!what
    :: failed
    fi
}

inline origin_performs()
{
    if
    :: o_act == A_STOP -> traced = 1
    :: o_act == A_EXTRACT -> dirty = 0; running()
    :: o_act == A_SEND_PREPARE -> to_destination(E_PREPARE)
    :: o_act == A_SAVE_STATE -> saved = 1
    :: o_act == A_SILENCE -> silent = 1
    :: o_act == A_VERIFY -> failed = dirty
    :: o_act == A_WRITE_OFFERED -> journal = OFFERED
    :: o_act == A_FENCE -> fenced = 1
    :: o_act == A_PIN -> pinned = 1
    :: o_act == A_SEND_COMMIT -> to_destination(E_COMMIT)
    :: o_act == A_WRITE_COMMITTED -> journal = COMMITTED
    :: o_act == A_WRITE_LET_GO -> journal = LET_GO
    :: o_act == A_END -> endpoint = 0
    :: o_act == A_RESUME -> traced = 0; pinned = 0; running()
    :: o_act == A_FORGET -> saved = 0;
        if
        :: o_state == O_DONE || o_state == O_LOST -> to_destination(SETTLED)
        :: else
        fi
    :: o_act == A_WRITE_DONE -> journal = DONE
    :: o_act == A_WRITE_LOST -> journal = LOST
    :: o_act == A_WRITE_ABORTED -> journal = NOTHING
    :: o_act == A_UNDO ->
        REQUIRE(!ever_committed);                /* never taken back after the commit */
        REQUIRE(endpoint);                       /* there is something to give back */
        fenced = 0; silent = 0; traced = 0; pinned = 0; running()
    :: o_act == A_SEND_ABORT -> to_destination(E_ABORT)
    :: o_act == A_SEND_QUERY -> to_destination(E_QUERY)
    :: o_act == A_SEND_ACTIVATE ->
        REQUIRE(saved);                          /* the state is there as long as it may be needed */
        to_destination(E_ACTIVATE)
    :: else                                     /* nothing that this model looks at */
    fi
}

/* A serve's machine, or the serve, has ended: the program closes what is dormant, and keeps what is alive. */
inline lets_go(i)
{
    if
    :: sock_of == i + 1 -> sock_of = 0
    :: else
    fi;
    if
    :: told_by == i + 1 -> told_by = 0; in_program = (sock == 2 -> in_program : 0)
    :: else
    fi;
    close_unheld();
    if
    :: lock == i + 1 -> lock = 0
    :: else
    fi;
    s_state[i] = 0; s_pc[i] = 0; s_act[i] = 0; s_asked[i] = 0; s_has[i] = 0; s_delivered[i] = 0
}

inline close_unheld()
{
    if
    :: sock > 0 && sock_of == 0 && !in_program -> lived_and_ended = lived; sock = 0
    :: else
    fi
}

inline serve_ends(i)
{
    lets_go(i);
    s_process[i] = GONE
}

inline serve_event(i, ev)
{
    next = DESTINATION_TRANSITION(s_state[i], ev);
    next = (next > 0 -> next : DESTINATION_TRANSITION(s_state[i], E_LINK_LOST));
    assert(next > 0);
    s_state[i] = next / 256;
    s_pc[i] = next % 256;
    serve_load(i);
    if
    :: s_act[i] == 0 && D_FINAL(s_state[i]) -> lets_go(i); s_process[i] = LISTENS
    :: else
    fi
}

inline to_origin(i, what)
{
    failed = o_hung_up[i] || full(to_o[i]);
    if
    :: !failed -> to_o[i]!what
    :: failed
    fi
}

inline decide(i, wanted)
{
    if
    :: verdict == 0 -> verdict = wanted; ever_committed = ever_committed || wanted == 1
    :: else
    fi;
    happened = (verdict == ABORTED -> E_DECIDED_ABORTED :
               (s_asked[i] && written_active -> E_DECIDED_ACTIVE : E_DECIDED_COMMITTED))
}

inline restore(i)
{
    if
    :: sock == 0 -> sock = 1; sock_of = i + 1; s_has[i] = 1
    :: else -> failed = 1
    fi
}

inline graft(i)
{
    in_program = 1; told_by = i + 1
}

inline serve_performs(i)
{
    if
    :: s_act[i] == A_RESTORE -> restore(i)
    :: s_act[i] == A_GRAFT -> graft(i)
    :: s_act[i] == A_SEND_PREPARED -> to_origin(i, E_PREPARED)
    :: s_act[i] == A_CHECK_TARGET -> failed = !(s_has[i] && in_program && told_by == i + 1)
    :: s_act[i] == A_DECIDE_COMMITTED ->
        if
        :: directory -> decide(i, 1)
        :: else -> failed = 1
        fi
    :: s_act[i] == A_DECIDE_ABORTED ->
        if
        :: !directory -> directory = 1; verdict = 0
        :: else
        fi;
        decide(i, ABORTED)
    :: s_act[i] == A_UNFENCE -> d_fence = 0
    :: s_act[i] == A_ACTIVATE ->
        if
        :: s_delivered[i]
        :: !s_delivered[i] && (!s_has[i] || sock == 0) -> failed = 1
        :: !s_delivered[i] && s_has[i] && sock == 1 ->
            REQUIRE(verdict == 1);               /* never activated before committed is written */
            REQUIRE(!dirty);                     /* nor anything older than what the program did since */
            REQUIRE(!lived_and_ended);           /* nor twice */
            sock = 2;
            happened = 255                      /* its second half is a step of its own */
        :: !s_delivered[i] && s_has[i] && sock == 2 ->
            delivered = 1; sock_of = 0; told_by = 0; s_has[i] = 0
        fi
    :: s_act[i] == A_RECLAIM ->
        if
        :: written_lost -> failed = 1
        :: !written_lost && delivered -> s_delivered[i] = 1
        :: !written_lost && !delivered && sock > 0 && in_program ->
            d_fence = 1; sock_of = i + 1; told_by = i + 1; s_has[i] = 1
        :: !written_lost && !delivered && !(sock > 0 && in_program) -> d_fence = 1; restore(i); graft(i)
        fi
    :: s_act[i] == A_DISCARD ->
        if
        :: s_has[i] -> s_has[i] = 0; in_program = 0; told_by = 0; sock_of = 0; close_unheld()
        :: else
        fi;
        d_fence = 0;
        if
        :: verdict != 1 -> directory = 0; verdict = 0
        :: else
        fi
    :: s_act[i] == A_WRITE_ACTIVE -> written_active = 1
    :: s_act[i] == A_WRITE_LOST -> written_lost = 1
    :: s_act[i] == A_SEND_COMMITTED -> to_origin(i, E_COMMITTED)
    :: s_act[i] == A_SEND_ACTIVE -> to_origin(i, E_ACTIVE)
    :: s_act[i] == A_SEND_ABORTED -> to_origin(i, E_ABORTED)
    :: s_act[i] == A_SEND_LOST -> to_origin(i, E_LOST)
    :: else
    fi
}

/* It was asked about the pass, and has the lock (or there is no journal). */
inline answer(i)
{
    if
    :: directory -> lock = i + 1; s_asked[i] = 1; s_state[i] = D_READY; s_process[i] = RUNS; serve_event(i, E_QUERY)
    :: else -> to_origin(i, E_ABORTED); s_process[i] = LISTENS
    fi
}

inline sweep()
{
    if
    :: directory && lock == 0 && verdict != 1 -> directory = 0; verdict = 0; d_fence = 0
    :: else
    fi
}

inline drain(queue)
{
    do
    :: nempty(queue) -> queue?message
    :: empty(queue) -> break
    od
}

inline connect(i)
{
    drain(to_o[i]);
    drain(to_d[i]);
    o_hung_up[i] = 0;
    s_process[i] = LISTENS;
    o_link = i + 1;
    sweep()
}

#define WAITING(i) (s_process[i] == RUNS && s_act[i] == 0)
#define O_WAITS (o_process > 0 && o_act == 0)
#ifdef NO_LOCK
#define LOCK_FREE 1
#else
#define LOCK_FREE (lock == 0)
#endif

/* What the serve in slot i can do. */
#define SERVE(i) \
    :: d_step { s_process[i] == RUNS && s_act[i] > 0 -> \
            failed = 0; happened = 0; serve_performs(i); \
            if \
            :: failed && !(BEST_EFFORT(s_act[i])) -> happened = E_FAILED \
            :: !(failed && !(BEST_EFFORT(s_act[i]))) && happened == 0 -> s_pc[i] = s_pc[i] + 1; serve_load(i); \
                if \
                :: s_act[i] == 0 -> happened = E_DONE \
                :: else \
                fi \
            :: else \
            fi; \
            if \
            :: happened > 0 && happened < 255 -> serve_event(i, happened) \
            :: else \
            fi; \
            check() } \
    :: d_step { WAITING(i) && nempty(to_d[i]) -> to_d[i]?message; serve_event(i, message); check() } \
    :: d_step { WAITING(i) && empty(to_d[i]) && o_hung_up[i] -> serve_event(i, E_LINK_LOST); check() } \
    :: d_step { WAITING(i) && impatience < IMPATIENCE -> impatience++; serve_event(i, E_TIMEOUT); check() } \
    :: timeout && WAITING(i) -> d_step { serve_event(i, E_TIMEOUT); check() } \
    :: d_step { s_process[i] == LISTENS && nempty(to_d[i]) -> to_d[i]?message; \
            if \
            :: message == E_QUERY -> s_process[i] = WAITS_FOR_LOCK \
            :: message == E_ABORT || message == SETTLED \
            :: else -> serve_ends(i) \
            fi; \
            check() } \
    :: d_step { s_process[i] == LISTENS && empty(to_d[i]) && o_hung_up[i] -> serve_ends(i); check() } \
    :: d_step { s_process[i] == WAITS_FOR_LOCK && (LOCK_FREE || !directory) -> failed = 0; answer(i); check() } \
    :: timeout && s_process[i] == WAITS_FOR_LOCK -> d_step { s_process[i] = LISTENS } \
    :: d_step { s_process[i] != GONE && d_crashes < CRASHES -> d_crashes++; serve_ends(i); check() } \
    :: d_step { nempty(to_d[i]) && losses < LOSSES -> losses++; to_d[i]?message } \
    :: d_step { nempty(to_o[i]) && losses < LOSSES -> losses++; to_o[i]?message } \
    :: d_step { len(to_d[i]) > 1 && reorders < REORDERS -> reorders++; to_d[i]?message; to_d[i]!message } \
    :: d_step { len(to_o[i]) > 1 && reorders < REORDERS -> reorders++; to_o[i]?message; to_o[i]!message }

init {
    d_step {
        s_process[0] = RUNS;
        s_state[0] = D_READY;
        o_state = O_READY;
        origin_event(E_START)
    }
    do
    :: d_step { o_process > 0 && o_act > 0 && o_act != A_RECONNECT ->
            failed = 0; happened = 0; origin_performs();
            if
            :: failed && !(BEST_EFFORT(o_act)) -> happened = E_FAILED
            :: else -> o_pc++; origin_load();
                if
                :: o_act == 0 -> happened = E_DONE
                :: else
                fi
            fi;
            if
            :: happened > 0 -> origin_event(happened)
            :: else
            fi;
            check() }
    :: d_step { o_act == A_RECONNECT && o_link > 0 -> hang_up() }
    :: d_step { o_act == A_RECONNECT && o_link == 0 && asked < PATIENCE && s_process[0] == GONE ->
            asked++; connect(0); o_pc++; origin_load(); check() }
    :: d_step { o_act == A_RECONNECT && o_link == 0 && asked < PATIENCE && s_process[1] == GONE ->
            asked++; connect(1); o_pc++; origin_load(); check() }
    :: d_step { o_act == A_RECONNECT && o_link == 0 && asked > 0 && o_state == O_DOUBT ->
            origin_event(E_OVERDUE); check() }
    :: d_step { o_act == A_RECONNECT && o_link == 0 && asked == PATIENCE -> origin_ends(); check() }
    :: d_step { O_WAITS && o_link > 0 && nempty(to_o[o_link - 1]) ->
            to_o[o_link - 1]?message; origin_event(message); check() }
    :: d_step { O_WAITS && (o_link == 0 || (empty(to_o[o_link - 1]) && s_process[o_link - 1] == GONE)) ->
            origin_event(E_LINK_LOST); check() }
    :: d_step { O_WAITS && impatience < IMPATIENCE -> impatience++; origin_event(E_TIMEOUT); check() }
    :: timeout && O_WAITS -> d_step { origin_event(E_TIMEOUT); check() }
    :: d_step { O_WAITS && cancels > 0 -> cancels--; origin_event(E_CANCEL); check() }
    :: d_step { o_process > 0 && o_crashes < CRASHES -> o_crashes++; o_state = 0; origin_ends(); check() }
    :: d_step { o_process == 0 && UNSETTLED ->
            resolves++;
            REQUIRE(resolves < RESOLVES);        /* recovery comes to its end */
            o_process = RESOLVE;
            if
            :: journal == OFFERED -> o_state = O_DOUBT; origin_event(E_TIMEOUT)
            :: journal == LET_GO -> o_state = O_LET_GO; origin_event(E_RECOVER)
            :: journal == COMMITTED -> o_state = O_COMMITTED; origin_event(E_RECOVER)
            fi;
            check() }
    SERVE(0)
    SERVE(1)
    :: timeout && o_process == 0 && !UNSETTLED && s_process[0] == GONE && s_process[1] == GONE -> d_step {
            sweep();
#ifdef REACHES
            assert(journal != REACHES);         /* for the test that the model comes there */
#endif
            REQUIRE(O_RUNS && !silent);          /* nothing stands still */
            REQUIRE(!saved || journal >= DONE);  /* no payload is left that release does not take away */
            REQUIRE(lock == 0 && !(directory && verdict != 1));
            REQUIRE(sock == 0 || delivered);     /* nothing dormant */
            /* Exactly one owner; or, where the program was let go before anybody committed, none. */
            REQUIRE((endpoint && !fenced) + (D_SPEAKS && delivered) == 1 || (journal == LOST && !ever_committed));
            REQUIRE(!ever_committed || (D_SPEAKS && delivered && journal == DONE)) } -> break
    od
}
