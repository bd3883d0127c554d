/* The resync protocol of DESIGN 3 as a model: one granule of two sectors.
 *
 * A sane guest has one write per sector at a time; its source write and its tee run beside each other
 * (QEMU's quorum).  The mirror has a cache and a durable copy; the connection can be cut, with or without a
 * crash of the mirror's host that loses what was not flushed.  A periodic flush and a resync run beside it.
 * Where it stands in the code: the tee is core/tee.c, `unfl`/`flushing` are the two unflushed sets of
 * core/book.c, `fresh` is core/fresh_map.c, the resync is core/resync.c and core/copier.c, `conn` is the number
 * of the mirror connection, `lockd` the range lock.
 *
 * Property `same`: in MIRRORING, connected, nothing in flight, nothing dirty: both sides are equal.
 *
 * Each of these mutants breaks it, and `run` checks that it does:
 *   NODRAIN  the copier reads the source although a write acknowledged before the resync may not be on it yet
 *   NOFRESH  the copier overwrites what the guest wrote through the filter meanwhile
 *   NOFLUSH  the dirty bit is cleared when the copy is answered, not when it is flushed
 *   NOGEN    ... although the connection is not the one that the copy was sent on
 *
 * It leaves out: a crash of the filter (the seeded simulation of tests/ has it), fencing, lag mode, zones,
 * several granules.
 */
#ifndef NODRAIN
#define NODRAIN 0
#endif
#ifndef NOFRESH
#define NOFRESH 0
#endif
#ifndef NOFLUSH
#define NOFLUSH 0
#endif
#ifndef NOGEN
#define NOGEN 0
#endif
#define S 2
#ifndef W
#define W 2
#endif
#ifndef CUTS
#define CUTS 2
#endif
byte src[S], mir[S], dur[S];
bool fresh[S], unfl[S], flushing[S];
bool online=true, dirty=false, mirroring=true;
byte conn=0;          /* connection number */
bool srcbusy[S];      /* source write in flight */
bool held=false;      /* drain: QEMU holds new guest requests */
bool done[S];
byte lockd=0;         /* range lock holder: 0 none, 1.. sectors+1 tee, 9 copier (whole granule) */
byte cuts=0;

proctype SrcWrite(byte i, v) { src[i]=v; srcbusy[i]=false }

proctype Guest(byte i) {
  byte n=0; byte c;
  do
  :: n<W ->
     atomic { !held -> srcbusy[i]=true; n++; run SrcWrite(i,n) }
     /* the tee */
     atomic { lockd==0 -> lockd=i+1 }
     if
     :: atomic { online -> c=conn; fresh[i]=true }
        atomic { if :: (online && c==conn) -> mir[i]=n; unfl[i]=true     /* arrived and answered */
                    :: (online && c==conn) -> mir[i]=n; unfl[i]=true; dirty=true; mirroring=false; online=false; conn++  /* answer lost: counts as failed */
                       if :: unfl[0]||unfl[1]||flushing[0]||flushing[1] -> dirty=true :: else fi
                    :: else -> dirty=true; mirroring=false fi }
     :: atomic { !online -> dirty=true; mirroring=false }
     fi;
     lockd=0;
     /* guest's write ends when both ended */
     !srcbusy[i]
  :: n>=W -> break
  od;
  done[i]=true
}

/* connection lost; the mirror host may also have crashed and lost what was not flushed */
proctype Cut() {
  do
  :: cuts<CUTS && !(done[0]&&done[1]) -> atomic { cuts++; 
        if :: online -> online=false; conn++; 
              if :: unfl[0]||unfl[1]||flushing[0]||flushing[1] -> dirty=true; mirroring=false :: else fi;
              unfl[0]=false; unfl[1]=false;
              if :: skip /* only the link */
                 :: mir[0]=dur[0]; mir[1]=dur[1]
                 :: mir[0]=dur[0]
              fi
           :: else -> skip fi }
  :: (done[0]&&done[1]) || cuts>=CUTS -> break
  od
}

/* periodic flush while mirroring */
proctype Flusher() {
  byte c; byte k=0;
  do
  :: k<2 && online && (unfl[0]||unfl[1]) ->
     atomic { c=conn; flushing[0]=unfl[0]; flushing[1]=unfl[1]; unfl[0]=false; unfl[1]=false; k++ }
     atomic { if :: online && c==conn -> dur[0]=mir[0]; dur[1]=mir[1] :: else fi }
     atomic { if :: online && c==conn -> skip :: else -> if :: flushing[0]||flushing[1] -> dirty=true; mirroring=false :: else fi fi; flushing[0]=false; flushing[1]=false }
  :: k>=2 || (done[0]&&done[1]) -> break
  od
}

proctype Resync() {
  byte c; byte v[S]; byte t;
  do
  :: !mirroring || (dirty) || !online ->
     /* 1 connect; from here writes go to the mirror and are marked fresh */
     atomic { if :: !online -> online=true; conn++ :: else fi; c=conn; 
              fresh[0]=false; fresh[1]=false; mirroring=false }
#if !NODRAIN
     /* 2 drain */
     held=true; !srcbusy[0] && !srcbusy[1]; held=false;
#endif
     if
     :: dirty ->
        /* 3 read source (no lock), then write what is not fresh */
        v[0]=src[0]; v[1]=src[1];
        atomic { lockd==0 -> lockd=9 }
        atomic { if :: online && c==conn ->
#if NOFRESH
               mir[0]=v[0]; mir[1]=v[1];
#else
               if :: !fresh[0] -> mir[0]=v[0] :: else fi; if :: !fresh[1] -> mir[1]=v[1] :: else fi;
#endif
                 :: else fi; lockd=0 }
#if !NOFLUSH
        atomic { if :: online && c==conn -> dur[0]=mir[0]; dur[1]=mir[1] :: else fi }
#endif
#if NOGEN
        dirty=false
#else
        atomic { if :: online && c==conn -> dirty=false :: else fi }
#endif
     :: else -> skip
     fi;
     atomic { if :: online && c==conn && !dirty -> mirroring=true :: else fi }
  :: mirroring && !dirty && online && done[0] && done[1] && (cuts>=CUTS || true) -> break
  od
}
init { atomic { run Guest(0); 
#if TWO
 run Guest(1);
#else
 done[1]=true;
#endif
 run Cut(); run Flusher(); run Resync() } }
/* MIRRORING, connected, and nothing in flight: both sides equal */
#define quiet (!srcbusy[0] && !srcbusy[1] && lockd==0 && done[0] && done[1])
ltl same { [] ((mirroring && online && quiet && !dirty) -> (src[0]==mir[0] && src[1]==mir[1])) }
